"""Discrete counterparts of float layers: QuantConv2d, QuantLinear, 8-bit points between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.quantizer import FLOAT_BITS, MIN_SCALE, ActivationQuantizer, Bits, WeightQuantizer

BIAS_LIMIT = 2**30
"""Largest bias code: half of int32, so that the sum of the products still fits beside it."""


@dataclass(frozen=True)
class IntegerWeights:
    """A layer as integer kernels compute it, its BatchNorm folded in.

    Attributes:
        codes: weight codes on the grid, int8, (rows, ...).
        flip: (rows,) true where the code's sign is reversed, for negative BatchNorm weights.
        scale: (rows,) weight steps.
        bias: (rows,) int32 in units of ``bias_scale``, or float where activations are float.
        bias_scale: (rows,) input step times weight step, or None where activations are float.
    """

    codes: Tensor
    flip: Tensor
    scale: Tensor
    bias: Tensor
    bias_scale: Tensor | None


class QuantLayer(nn.Module):
    """What the discrete layers share: quantizers for weight and input, and the BatchNorm behind.

    Keeping the BatchNorm inside lets training use it as it is and the export fold it, without the
    rest of the model taking part.
    """

    weight: Tensor
    bias: Tensor | None
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None
    norm: nn.BatchNorm2d | None

    def _discretize(self, weight_bits: Bits, act_bits: int, norm: nn.BatchNorm2d | None) -> None:
        self.weight_quantizer = WeightQuantizer(self.weight.shape[0], weight_bits)
        self.weight_quantizer.to(self.weight.device)
        self.weight_quantizer.calibrate(self.weight)
        float_inputs = act_bits == FLOAT_BITS
        self.input_quantizer = None if float_inputs else ActivationQuantizer(act_bits)
        if self.input_quantizer is not None:
            self.input_quantizer.to(self.weight.device)
        self.norm = norm

    @torch.no_grad()
    def integer_weights(self) -> IntegerWeights:
        """Codes, steps and bias with the BatchNorm's running statistics folded in.

        The BatchNorm only rescales rows, so the codes stay as they are. A row whose bias would not
        fit its integer range (a BatchNorm weight of zero or nearly so) gets a larger step and is
        rounded again; such a row is, to that precision, a constant.
        """
        codes = self.weight_quantizer.codes(self.weight)
        scale = self.weight_quantizer.scale.double()
        bias = scale.new_zeros(len(scale)) if self.bias is None else self.bias.double()
        flip = torch.zeros_like(scale, dtype=torch.bool)
        if self.norm is not None:
            factor, shift = _affine(self.norm)
            flip = factor < 0
            scale = scale * factor.abs()
            bias = bias * factor + shift
        if self.input_quantizer is None:
            return IntegerWeights(codes, flip, scale.float(), bias.float(), None)
        input_scale = self.input_quantizer.scale.double()
        fitting = torch.maximum(scale, bias.abs() / (input_scale * BIAS_LIMIT)).clamp_min(MIN_SCALE)
        shrink = (scale / fitting).view(-1, *[1] * (codes.dim() - 1))
        codes = torch.where(shrink < 1, self._on_grid(codes * shrink), codes).to(torch.int8)
        # The steps a file holds are float32: round them first, so that the bias is counted in them.
        weight_scale = fitting.float()
        bias_scale = weight_scale * self.input_quantizer.scale
        bias_codes = (bias / bias_scale.double()).round().to(torch.int32)
        return IntegerWeights(codes, flip, weight_scale, bias_codes, bias_scale)

    def _on_grid(self, codes: Tensor) -> Tensor:
        return self.weight_quantizer.grid.round(codes)


class QuantConv2d(nn.Conv2d, QuantLayer):
    """A convolution with discrete weights and inputs, followed by the BatchNorm it came with."""

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        weight_bits: Bits,
        act_bits: int,
        norm: nn.BatchNorm2d | None = None,
    ) -> Self:
        """Take over a float convolution's parameters.

        Args:
            conv: the float layer, with zero padding.
            weight_bits: 1 to 8 or ``"ternary"``.
            act_bits: 1 to 8, or 32 to leave the input float.
            norm: the BatchNorm that alone reads the convolution's output.
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
        layer._discretize(weight_bits, act_bits, norm)
        return layer.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, rows, H', W')."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        y: Tensor = self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)
        return y if self.norm is None else self.norm(y)


class QuantLinear(nn.Linear, QuantLayer):  # type: ignore[misc]
    """A linear layer with discrete weights and inputs."""

    @classmethod
    def from_float(cls, linear: nn.Linear, weight_bits: Bits, act_bits: int) -> Self:
        """Take over a float layer's parameters; arguments as for `QuantConv2d.from_float`."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._discretize(weight_bits, act_bits, None)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


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


def _quantize_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
    point: Callable[[Tensor], Tensor] = module.output_quantizer  # type: ignore[assignment]
    return point(output)
