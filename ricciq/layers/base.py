"""What discrete layers share: their quantizers, their BatchNorm, and their integer weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, cast

import torch
from torch import Tensor, nn

from ricciq.layers.norm import BatchNorm, affine, turn_negative_rows
from ricciq.layers.rows import Place
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.config import LSQ, QuantizerConfig
from ricciq.quant.fake_quantize import MIN_SCALE
from ricciq.quant.grid import FLOAT_BITS, LARGEST_CODE, Bits
from ricciq.quant.weight import WeightQuantizer

BIAS_LIMIT = 2**30
"""Largest bias code: half of int32, so that its sum with the products still fits."""


@dataclass(frozen=True)
class IntegerWeights:
    """A layer as integer kernels compute it, its BatchNorm folded in.

    Attributes:
        codes: codes of the weight, int8, (rows, ...).
        stretch: the power of two that codes are multiplied by in the kernel. The bias is in
            units of their scale, so that few-bit layers do not round their bias coarsely.
        flip: (rows,) true where the code's sign is reversed, for negative BatchNorm weights.
        scale: (rows,) scales of the stretched codes.
        bias: (rows,) int32 in units of ``bias_scale``, or float where activations are float.
        bias_scale: (rows,) input scale times weight scale, or None where activations are float.
    """

    codes: Tensor
    stretch: int
    flip: Tensor
    scale: Tensor
    bias: Tensor
    bias_scale: Tensor | None


class KeptNorm(nn.Module):
    """Rescales every row of a weight to its first norm, so that training changes directions only.

    Weight normalization (Salimans & Kingma 2016, arXiv 1602.07868, eq. 2) with a fixed gain.

    Args:
        weight: (rows, ...), the one whose norms are kept.
    """

    norms: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("norms", weight.detach().flatten(1).norm(dim=1, keepdim=True))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the first norms, same shape."""
        rows = weight.flatten(1)
        gain = self.norms / rows.norm(dim=1, keepdim=True).clamp_min(MIN_SCALE)
        kept: Tensor = (rows * gain).view_as(weight)
        return kept


class Function(Protocol):
    """A layer's function of real numbers, on a weight in the order that kernels read."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Compute the function; while torch exports, add its ONNX operators to the graph instead.

        Args:
            x: the layer's input.
            weight: (rows, ...), or with the first two axes swapped where `weight_axis` is 1.
            bias: (rows,).
        """


class QuantLayer(nn.Module):
    """Base of the discrete layers: quantizers for weight and input, and the BatchNorm behind.

    With the BatchNorm inside the layer, training uses it as it is and the export folds it, and the
    rest of the model is not involved.

    The class variables are the traits of a kind of layer: all that the plan, the conversion and the
    deployment know of it. `quantizes` registers a kind for float classes.

    Attributes:
        norms: the classes of BatchNorm that a layer can take in from behind it.
        channel_axis: axis of the output channels in its output.
        weight_axis: axis of the output channels in the weight that kernels read: 0, or 1 where the
            first two axes are swapped. In training they are always first.
        operators: the ONNX operators that compute it.
        kernels: the integer kernels that onnxruntime makes of these operators.
        quantized_output: whether the kernel is integer only if its output, perhaps behind a ReLU,
            is quantized in one place.
        float_kernel: why its kernel is float although its codes are discrete, or None.
        zero_points: whether the file must list the weight's zero points although they are 0.
        copies_weight: whether its weight is a copy of the float layer's, which no other module may
            share then.
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
    lent_to: ClassVar[str | None] = None

    bias: Tensor | None
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None
    norm: BatchNorm | None

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:  # noqa: ARG003
        """Why a layer of a float class of this kind stays float, or None."""
        return None

    @classmethod
    def take_over(cls, module: nn.Module) -> Self:
        """A layer with the parameters and settings of a float one, still without quantizers."""
        raise NotImplementedError

    @classmethod
    def standardization(cls, module: nn.Module) -> nn.Module | None:  # noqa: ARG003
        """What the float layer does to its weight before using it, (rows, ...) to (rows, ...)."""
        return None

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        weight_bits: Bits,
        act_bits: int,
        norm: BatchNorm | None = None,
        config: QuantizerConfig = LSQ,
        turn: bool = False,
    ) -> Self:
        """A discrete layer with a float layer's parameters, its weight quantizer calibrated.

        Args:
            module: the float layer, for which `why_not` gives None.
            weight_bits: 1 to 8 or ``"ternary"``.
            act_bits: 1 to 8, or 32 to leave the input float.
            norm: the BatchNorm that is the only reader of the layer's output.
            config: which quantizers.
            turn: whether rows may change their sign, as `turn_negative_rows` does. No other layer
                may use the weight then.

        Raises:
            ValueError: a quantizer has no such width.
        """
        layer = cls.take_over(module)
        if norm is not None and turn:
            turn_negative_rows(layer.latent, layer.bias, norm)
        copy_attributes(module, layer)
        layer._discretize(weight_bits, act_bits, norm, cls.standardization(module), config)
        return layer.train(module.training)

    @property
    def latent(self) -> Tensor:
        """The float weight that is trained, (rows, ...)."""
        return cast(Tensor, self.weight)

    def function(self) -> Function:
        """What the layer computes from quantized inputs, a weight and a bias."""
        raise NotImplementedError

    def rows_at(self, x: Tensor, place: Place) -> Tensor:
        """What some outputs are computed from, as a linear regression.

        Args:
            x: the layer's input.
            place: of n outputs.

        Returns:
            (n, groups, inputs of an output), before the input quantizer; see `outputs`.
        """
        raise NotImplementedError

    @property
    def last_bias(self) -> Tensor | None:
        """(channels,) the bias that is added last: that of the BatchNorm, or the layer's own."""
        return self.bias if self.norm is None else self.norm.bias

    def pass_weight_through(self, module: nn.Module) -> None:
        """Use another module in place of the weight quantizer.

        Args:
            module: called with the latent weight, returns the one that the layer uses.
        """
        self.add_module("weight_quantizer", module)

    def _discretize(
        self,
        weight_bits: Bits,
        act_bits: int,
        norm: BatchNorm | None,
        standardize: nn.Module | None,
        config: QuantizerConfig,
    ) -> None:
        weight = self.latent
        if config.normalize:
            kept = KeptNorm(weight if standardize is None else standardize(weight))
            standardize = kept if standardize is None else nn.Sequential(standardize, kept)
        self.weight_quantizer = config.quantizer_for(weight, weight_bits, standardize)
        self.input_quantizer = None
        if act_bits != FLOAT_BITS:
            self.input_quantizer = config.activation_quantizer(act_bits).to(weight.device)
        self.norm = norm

    @torch.no_grad()
    def affine(self) -> tuple[Tensor, Tensor]:
        """What bias and BatchNorm make of the product of inputs and weights, in evaluation.

        Returns:
            ``factor`` and ``shift`` of ``factor * product + shift``, (rows,) each in float64.
        """
        shift = torch.zeros(len(self.latent), dtype=torch.float64, device=self.latent.device)
        if self.bias is not None:
            shift += self.bias
        if self.norm is None:
            return torch.ones_like(shift), shift
        factor, after = affine(self.norm)
        return factor, factor * shift + after

    @torch.no_grad()
    def integer_weights(self) -> IntegerWeights:
        """Codes, scales and bias with the BatchNorm's running statistics folded in.

        The BatchNorm only rescales rows, so the codes do not change. A row whose bias would exceed
        its integer range (its BatchNorm weight is zero or nearly so) gets a larger scale and is
        rounded again; to that precision, such a row is constant.
        """
        grid = self.weight_quantizer.grid
        stretch = max(1, 2 ** int(math.log2(LARGEST_CODE / max(1, -grid.low, grid.high))))
        codes = self.weight_quantizer.codes(self.latent)
        factor, bias = self.affine()
        flip = factor < 0
        scale = self.weight_quantizer.scale.double() / stretch * factor.abs()
        if self.input_quantizer is None:
            return IntegerWeights(codes, stretch, flip, scale.float(), bias.float(), None)
        input_scale = self.input_quantizer.scale.double()
        fitting = torch.maximum(scale, bias.abs() / (input_scale * BIAS_LIMIT)).clamp_min(MIN_SCALE)
        shrink = (scale / fitting).view(-1, *[1] * (codes.dim() - 1))
        if grid.has_zero:  # where no code is zero, rounding would make all of them alike
            codes = torch.where(shrink < 1, grid.round(codes * shrink), codes).to(torch.int8)
        # Scales are float32 in a file: round them first, as they are the unit of the bias.
        weight_scale = fitting.float()
        bias_scale = weight_scale * self.input_quantizer.scale
        bias_codes = (bias / bias_scale.double()).round().to(torch.int32)
        return IntegerWeights(codes, stretch, flip, weight_scale, bias_codes, bias_scale)


def copy_attributes(source: nn.Module, target: nn.Module) -> None:
    """Give a layer the public attributes of the one it replaces, as models may read them.

    Args:
        source: the layer that is replaced.
        target: keeps what it has itself.
    """
    for name, value in vars(source).items():
        if not name.startswith("_"):
            vars(target).setdefault(name, value)


def names_of(module: nn.Module, model: nn.Module) -> list[str]:
    """Every dotted name of a module in a model.

    Args:
        module: one that two parents share has two names.
        model: where it is looked for.
    """
    named = model.named_modules(remove_duplicate=False)
    return [name for name, other in named if other is module]
