"""Activations: one scale and a zero point for a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ricciq.quant.fake_quantize import MIN_SCALE, fake_quantize, masked, sloped
from ricciq.quant.grid import Bits, UniformGrid
from ricciq.quant.quantizer import Quantizer, perturbed


def _ignore(x: Tensor) -> None:
    """See nothing: an observed activation stays float."""


class ActivationQuantizer(Quantizer):
    """Per-tensor fake quantization of activations: one scale, one calibrated zero point.

    The base of all quantizers of activations. The codes are 0 to 2**bits - 1 around an integer zero
    point, which is 0 for activations that are never negative. While an observer is attached, it
    sees every input and nothing is quantized.

    Args:
        bits: 1 to 8.
    """

    clip_only = False
    """Whether the scale is learned from what is clipped alone: see `fake_quantize`."""
    bits: int
    zero_point: Tensor
    observer: Callable[[Tensor], None] | None = None
    slope: Tensor | None = None
    """See `fake_quantize`; None is the straight-through estimator's slope of 1."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.set_bits(bits)
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=self.learns_scale)
        self.register_buffer("zero_point", torch.zeros(()))

    def set_bits(self, bits: Bits) -> None:
        """See `Quantizer.set_bits`; a width is a number here."""
        self.bits = int(bits)
        self._grid = UniformGrid(0, 2**self.bits - 1)

    @property
    def grid(self) -> UniformGrid:
        """The codes."""
        return self._grid

    @torch.no_grad()
    def set_range(self, scale: float, zero_point: int) -> None:
        """Fix the zero point and set the scale that training starts from.

        Args:
            scale: positive.
            zero_point: 0 to 2**bits - 1.
        """
        self.log_scale.fill_(math.log(max(scale, MIN_SCALE)))
        self.zero_point.fill_(zero_point)

    @torch.no_grad()
    def ratio(self, x: Tensor) -> Tensor:
        """The activations in units of the scale, same shape."""
        return x.float() / self.scale

    @torch.no_grad()
    def slope_at(self, x: Tensor) -> Tensor:
        """What the gradient at each activation is multiplied by, same shape."""
        ratio, ones = self.ratio(x), torch.ones_like(x, dtype=torch.float32)
        if self.slope is None:
            return masked(ones, ratio, self.zero_point, self.grid)
        return sloped(ones, ratio, self.zero_point, self.slope, self.grid)

    def leave_float(self) -> None:
        """Return activations as they are, until the observer is taken away."""
        self.observer = _ignore

    def forward(self, x: Tensor) -> Tensor:
        """The discretized activations, same shape as x."""
        if self.observer is not None:
            self.observer(x)
            return x
        elements = x[0].numel() if x.dim() > 1 else x.numel()
        log_scale, zero_point, grid = self.log_scale, self.zero_point, self.grid
        gain = 1 / math.sqrt(elements * grid.high)
        if self.training and self.perturbation is not None:
            x = perturbed(x, log_scale, zero_point, grid, gain, self.perturbation)
        return fake_quantize(x, log_scale, grid, zero_point, gain, self.clip_only, self.slope)
