"""Activations: one scale and a zero point for a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ricciq.quant.fake_quantize import (
    MIN_SCALE,
    fake_quantize,
    masked,
    positive,
    sloped,
)
from ricciq.quant.grid import Bits, Grid
from ricciq.quant.quantizer import ActKind, Place, displaced, residual_in_cell


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
    slope: Tensor | None = None
    """See `fake_quantize`; None is the straight-through estimator's slope of 1."""
    place: Place | None = None

    def __init__(self, bits: int, kind: ActKind = "lsq") -> None:
        super().__init__()
        self.kind = kind
        self.set_bits(bits)
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=kind != "fixed")
        self.register_buffer("zero_point", torch.zeros(()))

    def set_bits(self, bits: Bits) -> None:
        """Take another width, a number; the range is then to be found anew."""
        self.bits = int(bits)
        self.grid = Grid(0, 2**self.bits - 1)

    @property
    def scale(self) -> Tensor:
        """The step, a scalar tensor, positive."""
        return positive(self.log_scale.detach())

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
        return residual_in_cell(self.ratio(x).flatten(1), self.zero_point, self.grid)

    @torch.no_grad()
    def slope_at(self, x: Tensor) -> Tensor:
        """What the gradient at each activation is multiplied by, same shape."""
        ratio, ones = self.ratio(x), torch.ones_like(x, dtype=torch.float32)
        if self.slope is None:
            return masked(ones, ratio, self.zero_point, self.grid)
        return sloped(ones, ratio, self.zero_point, self.slope, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """The discretized activations, same shape as x."""
        if self.observer is not None:
            self.observer(x)
            return x
        elements = x[0].numel() if x.dim() > 1 else x.numel()
        gain = 1 / math.sqrt(elements * self.grid.high)
        if self.training and self.place is not None:
            x = displaced(x, self.log_scale, self.zero_point, self.grid, gain, self.place)
        pact = self.kind == "pact"
        return fake_quantize(x, self.log_scale, self.grid, self.zero_point, gain, pact, self.slope)
