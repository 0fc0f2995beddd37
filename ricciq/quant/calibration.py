"""First scales of activations from a few batches, counted in histograms of constant size."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ricciq.errors import InputError
from ricciq.evaluation import evaluating
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.fake_quantize import dense, pieces

AT_ONCE = 64
"""Images of a forward pass: whole activations are counted, which takes several times their memory,
and batches may be so large that a training step of them does not fit."""
_OCTAVES = 48
_PER_OCTAVE = 32
_SMALLEST = 2.0**-24
_BINS = _OCTAVES * _PER_OCTAVE


def check_finite(found: Tensor, name: str) -> None:
    """Refuse what a float model returns if it is not finite.

    Args:
        found: of any shape.
        name: of the module that returned it, for the message.

    Raises:
        InputError: it holds NaN or an infinity.
    """
    if not found.isfinite().all():
        raise InputError(
            f"the float model gives NaN or infinite activations at {name} on the calibration "
            "images; check the checkpoint and the preprocessing"
        )


class LogHistogram:
    """Counts of numbers by sign and magnitude in bins 2 % wide; the order of batches is irrelevant.

    Magnitudes below 2**-24 count as zero, in the middle bin; those from 2**24 on fall in the last.

    Args:
        name: where the numbers are, for messages.
        most: of a tensor with more numbers, so many are counted, drawn with repetition, besides the
            least and the greatest of all. None counts all.
    """

    def __init__(self, name: str = "", most: int | None = None) -> None:
        self.name, self.most = name, most
        self._chance = torch.Generator().manual_seed(0)
        self.counts = torch.zeros(2 * _BINS + 1, dtype=torch.float64)
        self.low = math.inf
        self.high = -math.inf

    def __call__(self, x: Tensor) -> None:
        """Add the numbers of a tensor of any shape.

        Raises:
            InputError: the tensor holds NaN or an infinity.
        """
        x = dense(x.detach())
        x = x.as_strided([x.numel()], [1])  # without a copy, whatever the order of the axes
        if self.most is not None and len(x) > self.most:
            chosen = torch.randint(len(x), (self.most,), generator=self._chance)
            x = torch.cat([x[chosen.to(x.device)], torch.stack(x.aminmax())])
        for (part,) in pieces([], [x]):
            self._widen(part)
            self._add(part.float())

    def _widen(self, x: Tensor) -> None:
        low, high = (float(end) for end in x.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(
                f"activations are NaN or infinite at {self.name} on the calibration images; "
                "check the checkpoint and the preprocessing"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)

    def _add(self, x: Tensor) -> None:
        # In place, and in 32 bits: memory costs more time than arithmetic.
        octave = x.abs().clamp_min_(_SMALLEST / 2).div_(_SMALLEST).log2_()
        magnitude = octave.mul_(_PER_OCTAVE).floor_().add_(1).clamp_(0, _BINS)
        bins = magnitude.copysign_(x).add_(_BINS).int().flatten()
        self.counts += torch.bincount(bins, minlength=2 * _BINS + 1).cpu()

    def centers(self) -> Tensor:
        """(bins,) the center of each bin, from the most negative to the largest."""
        exponent = (torch.arange(_BINS, dtype=torch.float64) + 0.5) / _PER_OCTAVE
        positive = _SMALLEST * exponent.exp2()
        return torch.cat([-positive.flip(0), positive.new_zeros(1), positive])


def choose_range(histogram: LogHistogram, bits: int, candidates: int = 100) -> tuple[float, int]:
    """The scale and zero point with the least squared rounding error over what was counted.

    Activations that are never negative get zero point 0. For others, zero points around the one
    that their range suggests are searched together with scales.

    Args:
        histogram: of the quantizer's input.
        bits: 1 to 8.
        candidates: how many scales to try.

    Returns:
        The scale, positive, and the zero point, 0 to 2**bits - 1.
    """
    top = 2**bits - 1
    used = histogram.counts > 0
    x, counts = (
        histogram.centers()[used].clamp(histogram.low, histogram.high),
        histogram.counts[used],
    )
    span = max(histogram.high, 0.0) - min(histogram.low, 0.0)
    if span == 0.0:
        return 1.0, 0
    zero_points = [0]
    if histogram.low < 0:
        suggested = round(-histogram.low / span * top)
        reach = range(suggested - 2, suggested + 3)
        zero_points = sorted({min(max(z, 0), top) for z in (*reach, (top + 1) // 2)})
    best = (math.inf, 1.0, 0)
    for zero_point in zero_points:
        needed = max(
            histogram.high / max(top - zero_point, 0.5), -histogram.low / max(zero_point, 0.5)
        )
        scales = needed * torch.arange(1, candidates + 1, dtype=torch.float64) / candidates
        codes = (x / scales[:, None]).round().add(zero_point).clamp(0, top) - zero_point
        errors = ((codes * scales[:, None] - x).square() * counts).sum(1)
        least = int(errors.argmin())
        best = min(best, (float(errors[least]), float(scales[least]), zero_point))
    return best[1], best[2]


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor], candidates: int = 100) -> None:
    """Set every activation quantizer's scale and zero point from its inputs.

    The model runs in evaluation mode with discrete weights and float activations, so that ranges do
    not depend on each other.

    Args:
        model: a converted model.
        batches: (B, C, H, W) inputs on the model's device; memory does not grow with their number.
        candidates: how many scales to try; see `choose_range`.

    Raises:
        InputError: there is no batch, activations are not finite, or no image reaches a quantizer.
    """
    named = [(n, m) for n, m in model.named_modules() if isinstance(m, ActivationQuantizer)]
    quantizers = [quantizer for _, quantizer in named]
    histograms = [LogHistogram(name) for name, _ in named]
    seen = 0
    try:
        for quantizer, histogram in zip(quantizers, histograms, strict=True):
            quantizer.observer = histogram
        with evaluating(model):
            for images in batches:
                for some in torch.split(images, AT_ONCE):
                    model(some)
                seen += len(images)
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
    if not seen:
        raise InputError("there is no image to calibrate on; give at least one batch")
    for quantizer, histogram in zip(quantizers, histograms, strict=True):
        if not histogram.counts.any():
            raise InputError(
                f"no calibration image reaches {histogram.name}; give images that take the path "
                "which the model was converted along"
            )
        quantizer.set_range(*choose_range(histogram, quantizer.bits, candidates))
