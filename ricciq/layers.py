"""Discrete counterparts of float layers: QuantConv2d, QuantLinear, 8-bit points between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from timm.layers import (
    Conv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
    get_same_padding,
)
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.fake_quantize import MIN_SCALE
from ricciq.quant.grid import LARGEST_CODE, Bits
from ricciq.quant.quantizer import FLOAT_BITS, LSQ, Kinds
from ricciq.quant.weight import WeightQuantizer

BIAS_LIMIT = 2**30
"""Largest bias code: half of int32, so that the sum of the products still fits beside it."""

STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
CONVOLUTIONS = (nn.Conv2d, Conv2dSame, *STANDARDIZED)
"""The classes that `QuantConv2d` stands in for; a subclass may do anything, so it is kept."""
LINEARS = (nn.Linear, TimmLinear)
"""The classes that `QuantLinear` stands in for."""


@dataclass(frozen=True)
class IntegerWeights:
    """A layer as integer kernels compute it, its BatchNorm folded in.

    Attributes:
        codes: weight codes on the grid or of the codebook, int8, (rows, ...).
        stretch: the power of two that codes are multiplied by in the kernel. Bias codes count the
            step of stretched codes, so that few-bit layers do not round their bias coarsely.
        flip: (rows,) true where the code's sign is reversed, for negative BatchNorm weights.
        scale: (rows,) steps of the stretched codes.
        bias: (rows,) int32 in units of ``bias_scale``, or float where activations are float.
        bias_scale: (rows,) input step times weight step, or None where activations are float.
    """

    codes: Tensor
    stretch: int
    flip: Tensor
    scale: Tensor
    bias: Tensor
    bias_scale: Tensor | None


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


class KeptNorm(nn.Module):
    """Gives every row of a weight the norm that it had at first, so that training only turns it.

    Weight normalization (Salimans & Kingma 2016, arXiv 1602.07868, eq. 2) with a fixed gain.

    Args:
        weight: (rows, ...), whose norms are kept.
    """

    norms: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("norms", weight.detach().flatten(1).norm(dim=1, keepdim=True))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with those norms, same shape."""
        rows = weight.flatten(1)
        gain = self.norms / rows.norm(dim=1, keepdim=True).clamp_min(MIN_SCALE)
        kept: Tensor = (rows * gain).view_as(weight)
        return kept


class QuantLayer(nn.Module):
    """What the discrete layers share: quantizers for weight and input, and the BatchNorm behind.

    Keeping the BatchNorm inside lets training use it as it is and the export fold it, without the
    rest of the model taking part.
    """

    bias: Tensor | None
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None
    norm: nn.BatchNorm2d | None

    @property
    def latent(self) -> Tensor:
        """The float weight that training changes, (rows, ...)."""
        return cast(Tensor, self.weight)

    def _discretize(
        self,
        weight_bits: Bits,
        act_bits: int,
        norm: nn.BatchNorm2d | None = None,
        standardize: nn.Module | None = None,
        kinds: Kinds = LSQ,
    ) -> None:
        weight = self.latent
        if kinds.normalize:
            kept = KeptNorm(weight if standardize is None else standardize(weight))
            standardize = kept if standardize is None else nn.Sequential(standardize, kept)
        self.weight_quantizer = WeightQuantizer(
            len(weight), weight_bits, standardize, kinds.weights
        )
        self.weight_quantizer.to(weight.device)
        self.weight_quantizer.calibrate(weight, kinds.search)
        float_inputs = act_bits == FLOAT_BITS
        self.input_quantizer = None
        if not float_inputs:
            self.input_quantizer = ActivationQuantizer(act_bits, kinds.activations)
        if self.input_quantizer is not None:
            self.input_quantizer.to(weight.device)
        self.norm = norm

    @torch.no_grad()
    def integer_weights(self) -> IntegerWeights:
        """Codes, steps and bias with the BatchNorm's running statistics folded in.

        The BatchNorm only rescales rows, so the codes stay as they are. A row whose bias would not
        fit its integer range (a BatchNorm weight of zero or nearly so) gets a larger step and is
        rounded again; such a row is, to that precision, a constant.
        """
        grid = self.weight_quantizer.grid
        stretch = max(1, 2 ** int(math.log2(LARGEST_CODE / max(1, -grid.low, grid.high))))
        codes = self.weight_quantizer.codes(self.latent)
        scale = self.weight_quantizer.scale.double() / stretch
        bias = scale.new_zeros(len(scale)) if self.bias is None else self.bias.double()
        flip = torch.zeros_like(scale, dtype=torch.bool)
        if self.norm is not None:
            factor, shift = _affine(self.norm)
            flip = factor < 0
            scale = scale * factor.abs()
            bias = bias * factor + shift
        if self.input_quantizer is None:
            return IntegerWeights(codes, stretch, flip, scale.float(), bias.float(), None)
        input_scale = self.input_quantizer.scale.double()
        fitting = torch.maximum(scale, bias.abs() / (input_scale * BIAS_LIMIT)).clamp_min(MIN_SCALE)
        shrink = (scale / fitting).view(-1, *[1] * (codes.dim() - 1))
        if grid.has_zero:  # where no code is zero, rounding would make all of them alike
            codes = torch.where(shrink < 1, grid.round(codes * shrink), codes).to(torch.int8)
        # The steps a file holds are float32: round them first, so that the bias is counted in them.
        weight_scale = fitting.float()
        bias_scale = weight_scale * self.input_quantizer.scale
        bias_codes = (bias / bias_scale.double()).round().to(torch.int32)
        return IntegerWeights(codes, stretch, flip, weight_scale, bias_codes, bias_scale)


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


class QuantLinear(nn.Linear, QuantLayer):  # type: ignore[misc]
    """A linear layer with discrete weights and inputs."""

    @classmethod
    def from_float(
        cls, linear: nn.Linear, weight_bits: Bits, act_bits: int, kinds: Kinds = LSQ
    ) -> Self:
        """Take over a float layer's parameters; arguments as for `QuantConv2d.from_float`."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._discretize(weight_bits, act_bits, kinds=kinds)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


class QuantLinearWeight(QuantLayer):
    """A linear layer that is never called: its parent hands ``weight`` to `F.linear` itself.

    Reading ``weight`` gives the discrete one; the parent's input passes through the quantizer.
    """

    latent_weight: Tensor
    in_features: int
    out_features: int

    @classmethod
    def from_float(
        cls, linear: nn.Linear, weight_bits: Bits, act_bits: int, kinds: Kinds = LSQ
    ) -> Self:
        """Take over a float layer's parameters; arguments as for `QuantConv2d.from_float`."""
        layer = cls()
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.latent_weight, layer.bias = linear.weight, linear.bias
        layer._discretize(weight_bits, act_bits, kinds=kinds)
        return layer.train(linear.training)

    @property
    def latent(self) -> Tensor:
        """The float weight that training changes, (out_features, in_features)."""
        return self.latent_weight

    @property
    def weight(self) -> Tensor:
        """The discrete weight, (out_features, in_features)."""
        weight: Tensor = self.weight_quantizer(self.latent_weight)
        return weight


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


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation as ``factor * x + shift``, both (channels,) in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.double()


def names_of(module: nn.Module, model: nn.Module) -> list[str]:
    """Every name a module goes by; a layer that two parents share has two."""
    named = model.named_modules(remove_duplicate=False)
    return [name for name, other in named if other is module]


def quantize_output(module: nn.Module, quantizer: nn.Module) -> None:
    """Let everything ``module`` returns pass through ``quantizer``.

    A hook rather than a wrapper: the module keeps its class, its attributes and its place, so
    models that look into their blocks go on working.
    """
    module.add_module("output_quantizer", quantizer)
    module.register_forward_hook(_quantize_output)


def quantize_input(module: nn.Module, quantizer: nn.Module) -> None:
    """Let the first argument of ``module`` pass through ``quantizer``."""
    module.add_module("input_quantizer", quantizer)
    module.register_forward_pre_hook(_quantize_input)


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    point: Callable[[Tensor], Tensor] = module.input_quantizer  # type: ignore[assignment]
    return (point(args[0]), *args[1:])


def _quantize_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
    point: Callable[[Tensor], Tensor] = module.output_quantizer  # type: ignore[assignment]
    return point(output)
