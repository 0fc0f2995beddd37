"""What discrete layers share: their quantizers, the BatchNorm behind, and their integer weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, cast

import torch
from torch import Tensor, nn

from ricciq.layers.norm import BatchNorm, affine, turn_negative_rows
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.fake_quantize import MIN_SCALE
from ricciq.quant.grid import LARGEST_CODE, Bits
from ricciq.quant.quantizer import FLOAT_BITS, LSQ, Kinds
from ricciq.quant.weight import WeightQuantizer

BIAS_LIMIT = 2**30
"""Largest bias code: half of int32, so that the sum of the products still fits beside it."""


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


class Function(Protocol):
    """A layer's real-valued function, given its weight in the order that the kernels read."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Compute it; while torch exports, add its ONNX operators to the graph instead.

        Args:
            x: input of the layer.
            weight: (rows, ...), or with the first two axes swapped where `weight_axis` is 1.
            bias: (rows,).
        """


class QuantLayer(nn.Module):
    """What the discrete layers share: quantizers for weight and input, and the BatchNorm behind.

    Keeping the BatchNorm inside lets training use it as it is and the export fold it, without the
    rest of the model taking part.

    The class variables are the traits of a kind of layer. The plan, the conversion and the
    deployment know of a kind what these say, and `quantizes` tells which float classes it stands
    in for.

    Attributes:
        norms: the classes of BatchNorm behind it that it takes in.
        channel_axis: of the output channels in its output.
        weight_axis: of the output channels in the weight that the kernels read: 0, or 1 where
            they want the first two axes swapped. Training has them first in any case.
        operators: the ONNX operators that compute it.
        kernels: the integer kernels that onnxruntime makes of them.
        quantized_output: whether the kernel is an integer one only if its output, perhaps behind
            a ReLU, is quantized at one place.
        float_kernel: why its kernel is a float one although its codes are discrete, or None.
        zero_points: whether the file must spell out that the weight's zero points are 0.
        copies_weight: whether its weight is another parameter than the float layer's, which no
            other module may have then.
        seen: names of attributes of the float layer that models look at when they run.
        lent_to: see `quantizes`.
    """

    norms: ClassVar[tuple[type[nn.Module], ...]] = ()
    channel_axis: ClassVar[int] = 1
    weight_axis: int = 0
    operators: ClassVar[tuple[str, ...]] = ()
    kernels: ClassVar[tuple[str, ...]] = ()
    quantized_output: ClassVar[bool] = False
    float_kernel: ClassVar[str | None] = None
    zero_points: ClassVar[bool] = False
    copies_weight: ClassVar[bool] = False
    seen: ClassVar[tuple[str, ...]] = ()
    lent_to: ClassVar[str | None] = None

    bias: Tensor | None
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None
    norm: BatchNorm | None

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:  # noqa: ARG003
        """Why a layer of a class that this one stands in for stays float, or None."""
        return None

    @classmethod
    def take_over(cls, module: nn.Module) -> Self:
        """A layer with a float one's parameters and settings, its quantizers still missing."""
        raise NotImplementedError

    @classmethod
    def standardization(cls, module: nn.Module) -> nn.Module | None:  # noqa: ARG003
        """What the float layer does to its weight before using it: (rows, ...) to the same."""
        return None

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        weight_bits: Bits,
        act_bits: int,
        norm: BatchNorm | None = None,
        kinds: Kinds = LSQ,
        turn: bool = False,
    ) -> Self:
        """Take over a float layer's parameters.

        Args:
            module: the float layer, for which `why_not` has no reason.
            weight_bits: 1 to 8 or ``"ternary"``.
            act_bits: 1 to 8, or 32 to leave the input float.
            norm: the BatchNorm that alone reads the layer's output.
            kinds: which quantizers.
            turn: whether rows may change their sign, as `turn_negative_rows` does. No other layer
                may use the weight then.
        """
        layer = cls.take_over(module)
        if norm is not None and turn:
            turn_negative_rows(layer.latent, layer.bias, norm)
        layer._discretize(weight_bits, act_bits, norm, cls.standardization(module), kinds)
        return layer.train(module.training)

    @property
    def latent(self) -> Tensor:
        """The float weight that training changes, (rows, ...)."""
        return cast(Tensor, self.weight)

    def function(self) -> Function:
        """What the layer computes from quantized inputs, a weight and a bias."""
        raise NotImplementedError

    def _discretize(
        self,
        weight_bits: Bits,
        act_bits: int,
        norm: BatchNorm | None,
        standardize: nn.Module | None,
        kinds: Kinds,
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
            factor, shift = affine(self.norm)
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


def names_of(module: nn.Module, model: nn.Module) -> list[str]:
    """Every name a module goes by; a layer that two parents share has two."""
    named = model.named_modules(remove_duplicate=False)
    return [name for name, other in named if other is module]
