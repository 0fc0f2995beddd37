"""Discrete convolutions, with the BatchNorm behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from timm.layers import (
    BatchNormAct2d,
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
from ricciq.layers.operators import onnx_operator
from ricciq.layers.registry import quantizes
from ricciq.layers.rows import Place, Taps, gather

STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


@dataclass(frozen=True)
class Window:
    """How a convolution's kernel moves over its input; pairs are (vertical, horizontal).

    Attributes:
        kernel_size: the size of the kernel, one entry for each axis.
        stride: outputs are this far apart in the input, one entry for each axis.
        dilation: weights are this far apart in the input, one entry for each axis.
        padding: zeros before and after each axis, last axis first: left, right, above, below.
        same: whether the padding depends on the input's size instead, as in TensorFlow's "SAME".
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    same: bool

    def edges(self, size: Sequence[int]) -> list[int]:
        """Zeros before and after each axis of an input of this size, last axis first."""
        if not self.same:
            return list(self.padding)
        edges: list[int] = []
        for axis in reversed(range(len(size))):
            total = get_same_padding(
                size[axis], self.kernel_size[axis], self.stride[axis], self.dilation[axis]
            )
            edges += [total // 2, total - total // 2]
        return edges

    def output_size(self, size: Sequence[int]) -> list[int]:
        """The size of the output, one entry for each axis."""
        edges = self.edges(size)
        both = [before + after for before, after in zip(edges[::2], edges[1::2], strict=True)]
        padded = [length + added for length, added in zip(size, reversed(both), strict=True)]
        moves = zip(padded, self.kernel_size, self.stride, self.dilation, strict=True)
        return [(length - d * (k - 1) - 1) // s + 1 for length, k, s, d in moves]


@dataclass(frozen=True)
class Convolution:
    """The function of a convolution, a `Function`.

    Attributes:
        window: how the kernel moves.
        groups: as in `torch.nn.Conv2d`.
    """

    window: Window
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(B, C, *size) -> (B, rows, *size)."""
        window, edges = self.window, self.window.edges(x.shape[2:])
        if not torch.onnx.is_in_onnx_export():
            convolve = {1: F.conv1d, 2: F.conv2d}[len(window.stride)]
            padding = edges[::2][::-1]
            if edges[::2] != edges[1::2]:
                x, padding = F.pad(x, edges), [0] * len(padding)
            moves: Any = window.stride, padding, window.dilation, self.groups
            return convolve(x, weight, bias, *moves)
        # As one operator: a Pad in front of it would keep the kernel float.
        attributes = {
            "pads": [*reversed(edges[::2]), *reversed(edges[1::2])],
            "strides": list(window.stride),
            "dilations": list(window.dilation),
            "group": self.groups,
        }
        shape = [x.shape[0], len(weight), *window.output_size(x.shape[2:])]
        return onnx_operator("Conv", [x, weight, bias], torch.float32, shape, attributes)


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


class QuantConv(QuantLayer):
    """Base of the convolutions, whatever the number of their axes.

    Attributes:
        same: whether the padding depends on the input's size, as in TensorFlow's "SAME".
    """

    operators = ("Conv",)
    kernels = ("QLinearConv", "ConvInteger")
    quantized_output = True
    settings = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    )

    same = False

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """A reason for padding modes other than zeros, which integer kernels lack."""
        if module.padding_mode != "zeros":
            return f"{module.padding_mode} padding has no integer kernel"
        return None

    @classmethod
    def take_over(cls, module: nn.Module) -> Self:
        """A convolution with the parameters of a float one."""
        layer = cls(
            **{name: getattr(module, name) for name in cls.settings},
            bias=module.bias is not None,
            device="meta",
        )
        layer.weight, layer.bias = module.weight, cast("nn.Parameter | None", module.bias)
        return layer

    @property
    def window(self) -> Window:
        """How the kernel moves over the input."""
        conv = cast(nn.Conv2d, self)
        return Window(
            tuple(conv.kernel_size),
            tuple(conv.stride),
            tuple(conv.dilation),
            tuple(conv._reversed_padding_repeated_twice),
            self.same,
        )

    def function(self) -> Convolution:
        """The convolution itself."""
        return Convolution(self.window, cast(int, self.groups))

    def rows_at(self, x: Tensor, place: Place) -> Tensor:
        """See `QuantLayer.rows_at`."""
        window = self.window
        before = window.edges(x.shape[2:])[::2][::-1]
        moves = zip(window.kernel_size, window.stride, window.dilation, before, strict=True)
        axes = [
            Taps(at[:, None] * step - edge + torch.arange(size, device=x.device) * apart)
            for at, (size, step, apart, edge) in zip(place[1:], moves, strict=True)
        ]
        return gather(x, place[0], axes, cast(int, self.groups))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, rows, *size)."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        if self.same:
            x = F.pad(x, self.window.edges(x.shape[2:]))
        conv = cast(nn.Conv2d, self)
        y: Tensor = conv._conv_forward(x, self.weight_quantizer(self.latent), self.bias)
        return y if self.norm is None else self.norm(y)


@quantizes(nn.Conv2d, Conv2dSame, *STANDARDIZED)
class QuantConv2d(QuantConv, nn.Conv2d):
    """A convolution with discrete weights and inputs, and the BatchNorm behind it."""

    norms = (nn.BatchNorm2d, BatchNormAct2d)

    @classmethod
    def take_over(cls, module: nn.Module) -> Self:
        """A convolution with the parameters and the padding of a float one."""
        layer = super().take_over(module)
        layer.same = isinstance(module, Conv2dSame) or getattr(module, "same_pad", False) is True
        return layer

    @classmethod
    def standardization(cls, module: nn.Module) -> nn.Module | None:
        """The standardization of timm's StdConv2d and ScaledStdConv2d, or None."""
        return (
            Standardization(cast(nn.Conv2d, module)) if isinstance(module, STANDARDIZED) else None
        )
