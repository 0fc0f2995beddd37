"""Grids, scales, fake quantization and the straight-through estimator.

A quantizer maps a number x to ``scale * code``; the codes are the integers of a `Grid`. The
gradient of that staircase is zero or infinite, so training uses the straight-through estimator
(STE, Bengio et al. 2013, arXiv 1308.3432) for x and the learned step size (LSQ, Esser et al. 2020,
arXiv 1902.08153) for the scale, whose logarithm is stored: it stays positive by any optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

Bits = int | Literal["ternary"]
"""A bit width from 1 to 8, ``"ternary"``, or 32 for float."""
WeightKind = Literal["lsq", "odd", "dorefa", "fixed"]
ActKind = Literal["lsq", "pact", "fixed"]


@dataclass(frozen=True)
class Kinds:
    """Which quantizers a network uses.

    Attributes:
        weights: "lsq" learns a step a row (Esser et al. 2020, arXiv 1902.08153); "odd" does, with
            levels -3, -1, 1, 3 and so on below 8 bits; "dorefa" spreads odd levels over the range
            of tanh(w) in the layer (Zhou et al. 2016, arXiv 1606.06160, eq. 9; at one bit, eq. 7,
            its two levels are the mean |w|); "fixed" keeps the steps that calibration found.
        activations: "lsq"; "pact" learns the clipping point from what is clipped alone (Choi et al.
            2018, arXiv 1805.06085, eq. 3), with LSQ's gain and without a decay of its own; "fixed".
    """

    weights: WeightKind = "lsq"
    activations: ActKind = "lsq"


LSQ = Kinds()

FLOAT_BITS = 32
MIN_SCALE = 2.0**-40


@dataclass(frozen=True)
class Grid:
    """The integer codes a quantizer may use: low, low + step, …, high.

    With step 1 a number goes to the nearest integer (half to even, as ONNX rounds); with step 2 the
    codes are odd, zero is a decision threshold and belongs to the cell above it.
    """

    low: int
    high: int
    step: int = 1
    clips: bool = True
    """Whether gradients are masked where a number lies beyond the ends."""

    @classmethod
    def for_weights(cls, bits: Bits, odd: bool = False) -> Grid:
        """Signed codes: two's complement, but ±1 at one bit, no zero, and symmetric at 8 bits.

        Odd ones are symmetric and have no zero; at 8 bits, where int8 holds no more, all are taken.
        """
        if bits == "ternary":
            return cls(-1, 1)
        if bits == 1:
            return cls(-1, 1, step=2)
        if bits == 8:  # -128 has no opposite, and negative BatchNorm weights flip signs on export
            return cls(-127, 127)
        if odd:
            return cls(1 - 2**bits, 2**bits - 1, step=2)
        return cls(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    @cached_property
    def just_outside(self) -> tuple[float, float]:
        """The float32 numbers next to the ends, below the lowest code and above the highest.

        Beside 0 it is the first normal one, as some devices take what is smaller for 0.
        """
        ends = torch.tensor([self.low, self.high], dtype=torch.float32)
        below, above = torch.nextafter(ends, ends.new_tensor([-math.inf, math.inf])).tolist()
        return min(below, self.low - torch.finfo(torch.float32).tiny), above

    @property
    def size(self) -> int:
        """How many codes there are."""
        return (self.high - self.low) // self.step + 1

    def round(self, ratio: Tensor) -> Tensor:
        """The nearest code of each ``x / scale``, as floating-point numbers of the same shape."""
        if self.step == 1:
            return ratio.round().clamp_(self.low, self.high)
        return (ratio / 2).floor_().mul_(2).add_(1).clamp_(self.low, self.high)


class _FakeQuantize(torch.autograd.Function):
    """x -> scale * code, with STE for x and LSQ for the scale; keeps x alone for the backward.

    What comes out is not kept, as the model may add to it in place. Nor is a mask: comparing and
    selecting take several times as long on a CPU as the arithmetic.
    """

    @staticmethod
    def forward(
        x: Tensor,
        log_scale: Tensor,
        zero_point: Tensor | None,
        grid: Grid,
        gain: float,
        clip_only: bool,
    ) -> Tensor:
        del gain, clip_only
        scale = _scale(log_scale)  # float32, as are codes and steps under mixed precision
        return _codes(x.float() / scale, zero_point, grid).mul_(scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        x, log_scale, zero_point, ctx.grid, ctx.gain, ctx.clip_only = inputs
        ctx.save_for_backward(x, log_scale, zero_point)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        x, log_scale, zero_point = ctx.saved_tensors
        scale = _scale(log_scale)
        ratio = x.float() / scale
        grad_x = _masked(grad, ratio, zero_point, ctx.grid)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None, None, None
        codes = _codes(ratio, zero_point, ctx.grid)
        # d(scale * code)/d(scale) is code - ratio inside the range, code at its ends (LSQ, eq. 3).
        if ctx.clip_only:
            per_scale = _sum_like(scale, grad - grad_x, codes)
        else:
            per_scale = _sum_like(scale, grad, codes) - _sum_like(scale, grad_x, x) / scale
        # LSQ steps the scale itself; dividing by it here makes a step of log(scale) the same
        # relative change, so published learning rates keep their meaning.
        return grad_x, per_scale * ctx.gain / scale, None, None, None, None


def _sum_like(scale: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Sums of a * b over what shares a step, in float32."""
    if scale.dim() == 0 and a.dtype == b.dtype == torch.float32:
        if a.is_contiguous(memory_format=torch.channels_last):
            a, b = a.movedim(1, -1), b.movedim(1, -1)
        return torch.dot(a.reshape(-1), b.reshape(-1))  # no product of their size in between
    return (a.float() * b).sum_to_size(scale.shape)


def _scale(log_scale: Tensor) -> Tensor:
    """exp, kept between 2**-40 and 2**40: a far too high learning rate must not end in NaN."""
    return log_scale.clamp(math.log(MIN_SCALE), -math.log(MIN_SCALE)).exp()


def _codes(ratio: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Of activations in the place of ``ratio``: fetching memory costs more than arithmetic."""
    if zero_point is None:
        return grid.round(ratio)
    return ratio.round_().add_(zero_point).clamp_(grid.low, grid.high).sub_(zero_point)


def _masked(grad: Tensor, ratio: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """The gradient where ``ratio`` lies within the grid's range, ends included, and 0 elsewhere."""
    if not grid.clips:
        return grad
    shifted = ratio if zero_point is None else ratio + zero_point
    masked: Tensor = torch.ops.aten.hardtanh_backward(grad.float(), shifted, *grid.just_outside)
    return masked.to(grad.dtype)


def _residual(ratio: Tensor, zero_point: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """Where each ratio stands in its cell, from -1 to 1 and 0 where masked; and where it is not."""
    inside = _masked(torch.ones_like(ratio), ratio, zero_point, grid).bool()
    from_level = ratio - _codes(ratio.clone(), zero_point, grid)
    return (from_level / (grid.step / 2)).clamp(-1, 1) * inside, inside


def fake_quantize(
    x: Tensor,
    log_scale: Tensor,
    grid: Grid,
    zero_point: Tensor | None = None,
    gain: float = 1.0,
    clip_only: bool = False,
) -> Tensor:
    """Round x to its grid: ``scale * (clamp(round(x / scale) + zero_point) - zero_point)``.

    Args:
        x: any shape.
        log_scale: natural logarithm of the step, broadcastable to x.
        grid: the codes, counted with the zero point added.
        zero_point: the code of 0.0, a whole number in a floating-point tensor of one element.
        gain: factor on the scale's gradient; LSQ uses 1 / sqrt(elements per scale * highest code).
        clip_only: leave what lies within the range out of the scale's gradient, as PACT does.

    Returns:
        The same shape and dtype as x. Its gradient is the straight-through estimator's: passed
        unchanged where x lies within the grid's range, exactly zero outside.
    """
    result: Tensor = _FakeQuantize.apply(x, log_scale, zero_point, grid, gain, clip_only)
    return result


class WeightQuantizer(nn.Module):
    """Per-channel fake quantization of a weight: one step for each output channel.

    Args:
        rows: output channels.
        bits: 1 to 8 or ``"ternary"``.
        standardize: what the layer does to its weight before using it, done before rounding; the
            methods take the weight as the layer stores it.
        kind: see `Kinds`.
    """

    def __init__(
        self,
        rows: int,
        bits: Bits,
        standardize: nn.Module | None = None,
        kind: WeightKind = "lsq",
    ) -> None:
        super().__init__()
        self.bits = bits
        self.kind = kind
        self.grid = Grid.for_weights(bits, odd=kind in ("odd", "dorefa"))
        if kind == "dorefa":  # nothing lies beyond its ends, but for two levels, eq. 7
            self.grid = replace(self.grid, clips=False)
        self.standardize = standardize or nn.Identity()
        if kind == "dorefa" and bits != 1:
            self.standardize = nn.Sequential(self.standardize, nn.Tanh())
        self.log_scale = nn.Parameter(torch.zeros(rows), requires_grad=kind in ("lsq", "odd"))

    @property
    def scale(self) -> Tensor:
        """The steps, shape (rows,), positive."""
        return _scale(self.log_scale.detach())

    @torch.no_grad()
    def calibrate(self, weight: Tensor, candidates: int = 100) -> None:
        """Set each row's step to the candidate with the least squared rounding error.

        A row of zeros takes the mean step of the others, so that training finds it in reach; at one
        bit, where no code is zero, 1/64 of it, which keeps the row near zero.

        Args:
            weight: (rows, ...), on the quantizer's device.
            candidates: how many steps to try, evenly spaced up to the one that clips nothing.
        """
        rows = self.standardize(weight).flatten(1).float()
        if self.kind == "dorefa":
            self.log_scale.data = self._spread(rows)
            return
        largest = rows.abs().amax(1, keepdim=True)
        live = largest > 0
        top = largest.clamp_min(MIN_SCALE) / self.grid.high
        best = torch.full_like(top, math.inf)
        chosen = top.clone()
        for fraction in torch.linspace(1 / candidates, 1, candidates).tolist():
            scale = top * fraction
            error = (self.grid.round(rows / scale) * scale - rows).square().sum(1, keepdim=True)
            chosen = torch.where(error < best, scale, chosen)
            best = torch.minimum(error, best)
        usual = chosen[live].mean() if live.any() else chosen.new_ones(())
        chosen = torch.where(live, chosen, usual / 64 if self.bits == 1 else usual)
        self.log_scale.copy_(chosen.clamp_min(MIN_SCALE).log().squeeze(1))

    def _spread(self, rows: Tensor) -> Tensor:
        """DoReFa's log steps, all alike: the layer's largest weight is at the end of the grid."""
        rows = rows.detach().abs()
        scale = rows.mean() if self.bits == 1 else rows.max() / self.grid.high
        return scale.clamp_min(MIN_SCALE).log().float().repeat(len(self.log_scale))

    def forward(self, weight: Tensor) -> Tensor:
        """The discretized weight, same shape as ``weight``."""
        standardized = self.standardize(weight)
        if self.kind == "dorefa":
            self.log_scale.data = self._spread(standardized)
        gain = 1 / math.sqrt(weight[0].numel() * self.grid.high)
        log_scale = self._columns(self.log_scale, weight)
        return fake_quantize(standardized, log_scale, self.grid, gain=gain)

    @torch.no_grad()
    def ratio(self, weight: Tensor) -> Tensor:
        """The standardized weight in units of its row's step, same shape."""
        ratio: Tensor = self.standardize(weight) / self._columns(self.scale, weight)
        return ratio

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """The integer codes of ``weight``, int8, same shape."""
        return self.grid.round(self.ratio(weight)).to(torch.int8)

    @torch.no_grad()
    def residual(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Where each weight stands in its quantization cell.

        Returns:
            (rows, n) residual in [-1, 1], zero at the level and ±1 at a decision threshold, set to
            zero where the straight-through estimator masks; and the (rows, n) mask, true where not.
        """
        return _residual(self.ratio(weight).flatten(1), None, self.grid)

    @staticmethod
    def _columns(per_row: Tensor, weight: Tensor) -> Tensor:
        return per_row.view(-1, *[1] * (weight.dim() - 1))


class ActivationQuantizer(nn.Module):
    """Per-tensor fake quantization of activations: one step, one calibrated zero point.

    The codes are 0 to 2**bits - 1 around a whole zero point, which is 0 for activations that are
    never negative. While an observer is attached, it is shown every input and nothing is quantized.

    Args:
        bits: 1 to 8.
        kind: see `Kinds`.
    """

    zero_point: Tensor
    observer: Callable[[Tensor], None] | None = None

    def __init__(self, bits: int, kind: ActKind = "lsq") -> None:
        super().__init__()
        self.bits = bits
        self.kind = kind
        self.grid = Grid(0, 2**bits - 1)
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=kind != "fixed")
        self.register_buffer("zero_point", torch.zeros(()))

    @property
    def scale(self) -> Tensor:
        """The step, a scalar tensor, positive."""
        return _scale(self.log_scale.detach())

    @torch.no_grad()
    def set_range(self, scale: float, zero_point: int) -> None:
        """Fix the zero point and set the step that training starts from."""
        self.log_scale.fill_(math.log(max(scale, MIN_SCALE)))
        self.zero_point.fill_(zero_point)

    @torch.no_grad()
    def ratio(self, x: Tensor) -> Tensor:
        """The activations in units of the step, same shape."""
        return x.float() / self.scale

    @torch.no_grad()
    def residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `WeightQuantizer.residual`, of activations (B, ...): a row is a picture's."""
        return _residual(self.ratio(x).flatten(1), self.zero_point, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """The discretized activations, same shape as x."""
        if self.observer is not None:
            self.observer(x)
            return x
        elements = x[0].numel() if x.dim() > 1 else x.numel()
        gain = 1 / math.sqrt(elements * self.grid.high)
        clip_only = self.kind == "pact"
        return fake_quantize(x, self.log_scale, self.grid, self.zero_point, gain, clip_only)
