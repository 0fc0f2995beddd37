"""Discrete convolutions, followed by the BatchNorm they came with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from timm.layers import (
    Conv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
    get_same_padding,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.layers.base import QuantLayer
from ricciq.quant.grid import Bits
from ricciq.quant.quantizer import LSQ, Kinds

STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
CONVOLUTIONS = (nn.Conv2d, Conv2dSame, *STANDARDIZED)
"""The classes that `QuantConv2d` stands in for; a subclass may do anything, so it is kept."""


@dataclass(frozen=True)
class Window:
    """How a convolution's kernel moves over its input; pairs are (vertical, horizontal).

    Attributes:
        padding: zeros left, right, above and below.
        same: whether instead the input's size decides, as in TensorFlow's "SAME".
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    same: bool

    def edges(self, size: Sequence[int]) -> list[int]:
        """Zeros left, right, above and below an input of (height, width)."""
        if not self.same:
            return list(self.padding)
        edges: list[int] = []
        for axis in (1, 0):
            total = get_same_padding(
                size[axis], self.kernel_size[axis], self.stride[axis], self.dilation[axis]
            )
            edges += [total // 2, total - total // 2]
        return edges

    def output_size(self, size: Sequence[int]) -> list[int]:
        """The output's (height, width)."""
        left, right, top, bottom = self.edges(size)
        padded = (size[0] + top + bottom, size[1] + left + right)
        moves = zip(padded, self.kernel_size, self.stride, self.dilation, strict=True)
        return [(length - d * (k - 1) - 1) // s + 1 for length, k, s, d in moves]


class Standardization(nn.Module):
    """What timm's StdConv2d and ScaledStdConv2d do to their weight before each convolution.

    Every row gets mean 0 and variance 1 (Qiao et al. 2019, arXiv 1903.10520), times a learned gain
    and a constant in the networks without normalization (Brock et al. 2021, arXiv 2101.08692).
    """

    gain: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.eps = float(conv.eps)  # type: ignore[arg-type]
        self.constant = float(getattr(conv, "scale", 1.0))
        self.register_parameter("gain", getattr(conv, "gain", None))

    def forward(self, weight: Tensor) -> Tensor:
        """The standardized weight, (rows, ...)."""
        rows = weight.flatten(1)
        variance, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
        rows = (rows - mean) * (variance + self.eps).rsqrt() * self.constant
        if self.gain is not None:
            rows = rows * self.gain.view(-1, 1)
        return rows.view_as(weight)


class QuantConv2d(nn.Conv2d, QuantLayer):
    """A convolution with discrete weights and inputs, followed by the BatchNorm it came with.

    Attributes:
        same: whether zeros are added around the input as its size demands, as TensorFlow does.
    """

    same = False

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        weight_bits: Bits,
        act_bits: int,
        norm: nn.BatchNorm2d | None = None,
        kinds: Kinds = LSQ,
    ) -> Self:
        """Take over a float convolution's parameters.

        Args:
            conv: the float layer, one of `CONVOLUTIONS`, with zero padding.
            weight_bits: 1 to 8 or ``"ternary"``.
            act_bits: 1 to 8, or 32 to leave the input float.
            norm: the BatchNorm that alone reads the convolution's output.
            kinds: which quantizers.
        """
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            device="meta",
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.same = isinstance(conv, Conv2dSame) or getattr(conv, "same_pad", False) is True
        standardize = Standardization(conv) if type(conv) in STANDARDIZED else None
        layer._discretize(weight_bits, act_bits, norm, standardize, kinds)
        return layer.train(conv.training)

    @property
    def window(self) -> Window:
        """How the kernel moves over the input."""
        return Window(
            tuple(self.kernel_size),
            tuple(self.stride),
            tuple(self.dilation),
            tuple(self._reversed_padding_repeated_twice),
            self.same,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, rows, H', W')."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        if self.same:
            x = F.pad(x, self.window.edges(x.shape[-2:]))
        y: Tensor = self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)
        return y if self.norm is None else self.norm(y)


@torch.no_grad()
def turn_negative_rows(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Negate the rows that a negative BatchNorm weight would negate; what comes out is the same.

    Folding such a weight turns codes around, which a two's complement grid cannot hold: the file
    would need a sign for each row.
    """
    if norm.weight is None or norm.running_mean is None:
        return
    sign = torch.where(norm.weight < 0, -1.0, 1.0)
    conv.weight.mul_(sign.view(-1, 1, 1, 1))
    for vector in (conv.bias, norm.weight, norm.running_mean):
        if vector is not None:
            vector.mul_(sign)
