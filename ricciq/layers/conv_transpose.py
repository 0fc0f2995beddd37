"""Discrete transposed convolutions: their codes are packed, onnxruntime's kernel is float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.layers.base import QuantLayer
from ricciq.layers.operators import onnx_operator
from ricciq.layers.registry import quantizes
from ricciq.layers.rows import Place, Taps, gather

Sizes = tuple[int, ...]


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """Swap the axes of input and output channels in the weight of a transposed convolution.

    Args:
        weight: (in_channels, rows / groups, ...), as PyTorch and ONNX store it, or
            (rows, in_channels / groups, ...).
        groups: of the convolution.

    Returns:
        The other of the two.
    """
    across, within, *kernel = weight.shape
    swapped = weight.reshape(groups, across // groups, within, *kernel).transpose(1, 2)
    return swapped.reshape(groups * within, across // groups, *kernel)


@dataclass(frozen=True)
class TransposedConvolution:
    """The function of a transposed convolution, a `Function`. Pairs are (vertical, horizontal).

    Attributes:
        kernel_size: as in `torch.nn.ConvTranspose2d`, and so are the next five.
        stride: outputs that one step in the input moves by.
        padding: outputs cut off at each side.
        output_padding: outputs added at the end of each axis.
        dilation: weights are this far apart in the output.
        groups: of channels that are convolved separately.
        swapped: whether the weight is as PyTorch and ONNX store it; else it is (rows, ...).
    """

    kernel_size: Sizes
    stride: Sizes
    padding: Sizes
    output_padding: Sizes
    dilation: Sizes
    groups: int
    swapped: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, rows, H', W')."""
        weight = weight if self.swapped else swap_channels(weight, self.groups)
        if bias is None or not torch.onnx.is_in_onnx_export():
            moves: Any = self.stride, self.padding, self.output_padding, self.groups, self.dilation
            return F.conv_transpose2d(x, weight, bias, *moves)
        attributes = {
            "pads": [*self.padding, *self.padding],
            "output_padding": list(self.output_padding),
            "strides": list(self.stride),
            "dilations": list(self.dilation),
            "group": self.groups,
        }
        shape = [x.shape[0], len(bias), *self.output_size(x.shape[2:])]
        return onnx_operator("ConvTranspose", [x, weight, bias], torch.float32, shape, attributes)

    def output_size(self, size: Sizes) -> list[int]:
        """The output's (height, width)."""
        moves = self.kernel_size, self.stride, self.padding, self.output_padding, self.dilation
        sides = zip(size, *moves, strict=True)
        return [(n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, more, d in sides]


@quantizes(nn.ConvTranspose2d)
class QuantConvTranspose2d(QuantLayer, nn.ConvTranspose2d):
    """A transposed convolution with discrete weights and inputs, and the BatchNorm behind it.

    Its ``weight`` is (rows, in_channels / groups, ...), as quantizers and gradient estimators need
    a row for each output channel. In PyTorch's, input channels are first.
    """

    norms = (nn.BatchNorm2d, BatchNormAct2d)
    operators = ("ConvTranspose",)
    float_kernel = "onnxruntime has no integer ConvTranspose on CPUs; its weights are discrete"
    copies_weight = True
    settings = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
    )

    @property
    def weight_axis(self) -> int:  # type: ignore[override]
        """1 with one group; with more, no axis of the kernel's weight has all output channels."""
        return 1 if self.groups == 1 else 0

    @classmethod
    def take_over(cls, module: nn.Module) -> Self:
        """A transposed convolution with the bias of a float one and a copy of its weight."""
        conv = cast(nn.ConvTranspose2d, module)
        settings = {name: getattr(conv, name) for name in cls.settings}
        layer = cls(**settings, bias=conv.bias is not None, device="meta")
        rows = swap_channels(conv.weight.detach(), conv.groups)
        rows = rows.clone(memory_format=torch.contiguous_format)
        layer.weight = nn.Parameter(rows, requires_grad=conv.weight.requires_grad)
        layer.bias = conv.bias
        return layer

    def function(self) -> TransposedConvolution:
        """The transposed convolution itself."""
        return self._function(swapped=self.weight_axis == 1)

    def _function(self, swapped: bool) -> TransposedConvolution:
        return TransposedConvolution(
            self.kernel_size,
            self.stride,
            cast(Sizes, self.padding),
            self.output_padding,
            self.dilation,
            self.groups,
            swapped,
        )

    def rows_at(self, x: Tensor, place: Place) -> Tensor:
        """See `QuantLayer.rows_at`."""
        axes, padding = [], cast(Sizes, self.padding)
        moves = zip(self.kernel_size, self.stride, self.dilation, padding, strict=True)
        for at, (size, step, apart, cut) in zip(place[1:], moves, strict=True):
            # Input i is added to the outputs i * step - cut + tap * apart.
            moved = at[:, None] + cut - torch.arange(size, device=x.device) * apart
            axes.append(Taps(moved.div(step, rounding_mode="floor"), moved % step == 0))
        return gather(x, place[0], axes, self.groups)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) -> (B, rows, H', W')."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        y = self._function(swapped=False)(x, self.weight_quantizer(self.weight), self.bias)
        return y if self.norm is None else self.norm(y)
