"""Deployed layers: packed codes, scales and integer biases, BatchNorm folded in.

They run in torch, as the reference for an exported file, and torch's exporter sees them as standard
ONNX operators.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ricciq.deploy.expressions import Expression, Operators
from ricciq.deploy.kernels import Codes, Sums, products, quantize
from ricciq.deploy.packing import Plane, pack, unpack
from ricciq.layers.base import Function, IntegerWeights, QuantLayer, copy_attributes, names_of
from ricciq.layers.hooks import quantize_output
from ricciq.layers.operators import onnx_operator
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.weight import WeightQuantizer

T = TypeVar("T")


def in_float(x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """What a `DeployedActivation` computes, by Div, Round, Clip and Mul.

    Args:
        x: of any shape.
        scale: of the quantizer.
        zero_point: the code of zero, uint8.
        low: the lowest code, uint8.
        high: the highest code, uint8.

    Returns:
        The same shape as x.
    """
    zero = zero_point.float()
    codes = ((x / scale).round() + zero).clamp(low.float(), high.float())
    return (codes - zero) * scale


class Kept(Generic[T]):
    """What others read as often as they have reserved; then its memory is free."""

    def __init__(self) -> None:
        self._reads = self._left = 0
        self._value: T | None = None

    def reserve(self) -> None:
        """Read once more in each forward pass."""
        self._reads += 1

    def put(self, value: T) -> None:
        """Keep a value, if anyone reads it."""
        self._left, self._value = self._reads, value if self._reads else None

    def take(self) -> T:
        """Read it."""
        value = self._value
        assert value is not None, "read more often than reserved"
        self._left -= 1
        if not self._left:
            self._value = None
        return value


class Source(ABC):
    """What an integer kernel computes the codes of a quantizer from."""

    @property
    @abstractmethod
    def operands(self) -> set[DeployedLayer | DeployedActivation]:
        """The layers and quantizers whose integers it reads."""

    @abstractmethod
    def codes(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The codes of the quantizer, 0 to 255.

        Args:
            scale: of the quantizer.
            zero_point: of the quantizer.
        """

    @abstractmethod
    def reserve(self) -> None:
        """Read once more in each forward pass."""


class DeployedActivation(nn.Module):
    """QuantizeLinear to uint8, Clip to the codes of the width, DequantizeLinear.

    Attributes:
        source: what its codes are computed from instead of its input: see `ricciq.deploy.links`.
        codes: of the last forward pass, for those that read them.
    """

    source: Source | None = None
    scale: Tensor
    zero_point: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.bits = quantizer.bits
        self.register_buffer("scale", quantizer.scale.clone())
        self.register_buffer("zero_point", quantizer.zero_point.to(torch.uint8))
        self.register_buffer("lowest", torch.zeros_like(self.zero_point))
        self.register_buffer("highest", torch.full_like(self.zero_point, quantizer.grid.high))
        self.codes = Kept[Codes]()

    def quantize(self, x: Tensor) -> Codes:
        """The codes of x, same shape."""
        zero = self.zero_point.float()
        if self.source is None:
            codes = quantize(x, self.scale, zero)
        else:
            codes = self.source.codes(self.scale, zero).reshape(x.shape)
        codes = codes.clamp(self.lowest.float(), self.highest.float())
        found = Codes(codes, self.scale, zero)
        self.codes.put(found)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        if not torch.onnx.is_in_onnx_export():
            found = self.quantize(x)
            return (found.values - found.zero_point) * found.scale
        quantized = [self.scale, self.zero_point]
        codes = onnx_operator("QuantizeLinear", [x, *quantized], torch.uint8, x.shape)
        if self.bits < 8:  # between the two: a Clip in front would keep the kernels float
            codes = onnx_operator("Clip", [codes, self.lowest, self.highest], torch.uint8, x.shape)
        return onnx_operator("DequantizeLinear", [codes, *quantized], torch.float32, x.shape)


class Constant(nn.Module):
    """A tensor that is stored in the file as it is.

    Args:
        value: the tensor.
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        """The tensor."""
        return self.value


INT16_MAX = 2**15 - 1


class DeployedWeight(Expression):
    """Packed codes -> table lookup -> reshape -> DequantizeLinear for each output channel.

    onnxruntime computes all but the last operator once, when it loads the file.

    Codes are int8, or uint8 with zero point 128 where int8 would saturate: x86 CPUs without VNNI
    multiply uint8 by int8 and add two such products in int16. For uint8 by uint8 they do not.

    Args:
        weights: the codes and scales.
        quantizer: the quantizer of these codes.
        axis: axis of the output channels: 0, or 1 to swap the first two.
        zero_points: whether to list zero points although they are 0, as onnxruntime wants for Gemm.
        highest: the highest code of the layer's input; 0 where the kernel is float.
    """

    scale: Tensor
    zero_point: Tensor | None
    sign: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        weights: IntegerWeights,
        quantizer: WeightQuantizer,
        axis: int = 0,
        zero_points: bool = False,
        highest: int = 0,
    ) -> None:
        codes, flip = weights.codes, weights.flip.view(-1, *[1] * (weights.codes.dim() - 1))
        grid, bits = quantizer.grid, quantizer.bits
        if grid.symmetric:  # rows with a negative BatchNorm weight change their sign
            codes, flip = torch.where(flip, -codes, codes), torch.zeros_like(flip)
        if axis == 1:
            codes, flip = codes.transpose(0, 1).contiguous(), flip.transpose(0, 1)
        super().__init__(codes.shape, codes.device)
        self.axis, self.shape = axis, list(codes.shape)
        self.register_buffer("scale", weights.scale)
        self.register_buffer("sign", 1 - 2 * flip.to(torch.int32) if flip.any() else None)
        largest = int((codes.int() * weights.stretch).abs().max())
        offset = 128 if 2 * highest * largest > INT16_MAX else 0
        zero = torch.full_like(weights.scale, offset, dtype=torch.uint8 if offset else torch.int8)
        self.register_buffer("zero_point", zero if zero_points or offset else None)
        offsets = torch.tensor(offset, dtype=torch.int32, device=codes.device)
        self.register_buffer("offset", offsets if offset else None)
        self.planes = 0
        if bits == 8:
            self.register_buffer("codes", (codes.int() + offset).to(zero.dtype))
            return
        for plane in pack(codes.cpu(), bits, grid):
            self.register_buffer(f"packed{self.planes}", plane.data)
            self.register_buffer(f"table{self.planes}", plane.table * weights.stretch)
            self.planes += 1
        self.to(codes.device)
        if self.planes == 1 and self.sign is None and not offset:
            self.register_buffer("table0", self.get_buffer("table0").to(torch.int8))

    def value(self) -> Tensor:
        """The dequantized weight."""
        behind = len(self.shape) - 1 - self.axis
        return self.integer_codes() * self.scale.view(-1, *[1] * behind)

    def integer_codes(self) -> Tensor:
        """The codes that kernels compute with: stretched, signs applied."""
        if not self.planes:
            codes = self.get_buffer("codes")
            return codes if self.offset is None else codes.int() - self.offset
        codes = unpack(self._plane_list(), _count(self.shape)).view(self.shape)
        return codes if self.sign is None else codes * self.sign

    def _plane_list(self) -> list[Plane]:
        return [
            Plane(self.get_buffer(f"packed{i}"), self.get_buffer(f"table{i}"))
            for i in range(self.planes)
        ]

    def write(self, operators: Operators) -> ir.Value:
        """See `Expression.write`."""
        operands = [self._write_codes(operators), operators.buffer("scale")]
        if self.zero_point is not None:
            operands.append(operators.buffer("zero_point"))
        return operators.add("DequantizeLinear", operands, axis=self.axis)

    def _write_codes(self, operators: Operators) -> ir.Value:
        """Unpack the codes to int8 or uint8."""
        if not self.planes:
            return operators.buffer("codes")
        parts, count = [], _count(self.shape)
        for i, plane in enumerate(self._plane_list()):
            to = ir.DataType.INT32
            index = operators.add("Cast", [operators.buffer(f"packed{i}")], to=to)
            part = operators.add("Gather", [operators.buffer(f"table{i}"), index], axis=0)
            if plane.data.numel() * plane.table.shape[1] != count:  # the last byte is not full
                part = operators.add("Reshape", [part, operators.integers(-1)])
                ends = operators.integers(0), operators.integers(count)
                part = operators.add("Slice", [part, *ends])
            parts.append(operators.add("Reshape", [part, operators.integers(*self.shape)]))
        total = parts[0]
        for part in parts[1:]:
            total = operators.add("Add", [total, part])
        if self.sign is not None:
            total = operators.add("Mul", [total, operators.buffer("sign")])
        if self.get_buffer("table0").dtype == torch.int8:
            return total
        if self.offset is None:
            return operators.add("Cast", [total], to=ir.DataType.INT8)
        total = operators.add("Add", [total, operators.buffer("offset")])
        return operators.add("Cast", [total], to=ir.DataType.UINT8)


class DeployedBias(Expression):
    """An int32 bias -> DequantizeLinear with the product of the scales of input and weight.

    onnxruntime multiplies the scales once, when it loads the file, which is smaller this way.

    Args:
        codes: (rows,) int32.
        input_scale: one number.
        weight_scale: (rows,).
    """

    codes: Tensor
    input_scale: Tensor
    weight_scale: Tensor

    def __init__(self, codes: Tensor, input_scale: Tensor, weight_scale: Tensor) -> None:
        super().__init__(codes.shape, codes.device)
        self.register_buffer("codes", codes)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("weight_scale", weight_scale)

    def value(self) -> Tensor:
        """The dequantized bias, (rows,)."""
        return self.codes * (self.input_scale * self.weight_scale)

    def write(self, operators: Operators) -> ir.Value:
        """See `Expression.write`."""
        scales = [operators.buffer(name) for name in ("input_scale", "weight_scale")]
        operands = [operators.buffer("codes"), operators.add("Mul", scales)]
        return operators.add("DequantizeLinear", operands, axis=0)


def _count(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


class DeployedLayer(nn.Module):
    """A layer of any kind: quantized input, packed weight, integer bias, BatchNorm folded in."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.axis = layer.weight_axis
        self.function = None if layer.lent_to else layer.function()
        copy_attributes(layer, self)
        weights, given = layer.integer_weights(), layer.input_quantizer
        self.weight_quantizer: nn.Module = DeployedWeight(
            weights,
            layer.weight_quantizer,
            layer.weight_axis,
            layer.zero_points,
            highest=0 if given is None or layer.float_kernel else given.grid.high,
        )
        self.input_quantizer: nn.Module | None = None
        self.bias_quantizer: nn.Module = Constant(weights.bias)
        self.sums = Kept[Sums]()
        self.is_integer = given is not None and not layer.float_kernel and not layer.lent_to
        self.channel_axis = layer.channel_axis
        if given is not None:
            self.input_quantizer = DeployedActivation(given)
            scales = self.input_quantizer.scale, weights.scale
            self.bias_quantizer = DeployedBias(weights.bias, *scales)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, (rows, ...): some models read it, such as for its device."""
        weight: Tensor = self.weight_quantizer()
        return weight.transpose(0, 1) if self.axis == 1 else weight

    @property
    def bias(self) -> Tensor:
        """The dequantized bias, (rows,)."""
        bias: Tensor = self.bias_quantizer()
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """The layer's function of the quantized input and weight."""
        assert self.function is not None, "a parent uses the weight"
        if self.is_integer and not torch.onnx.is_in_onnx_export():
            return self._in_integers(self.function, x)
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return self.function(x, self.weight_quantizer(), self.bias_quantizer())

    def _in_integers(self, function: Function, x: Tensor) -> Tensor:
        assert isinstance(self.input_quantizer, DeployedActivation)
        assert isinstance(self.weight_quantizer, DeployedWeight)
        assert isinstance(self.bias_quantizer, DeployedBias)
        given, weight = self.input_quantizer.quantize(x), self.weight_quantizer.integer_codes()
        found = products(function, given.values - given.zero_point, weight, self.axis)
        bias = self.bias_quantizer
        rows = [-1, *[1] * (-1 - self.channel_axis % -found.dim())]
        scale = (bias.input_scale * bias.weight_scale).view(rows)
        sums = Sums(found + bias.codes.view(rows), scale)
        self.sums.put(sums)
        return sums.values * sums.scale


def deploy(model: nn.Module) -> nn.Module:
    """A copy of a converted model as it is exported: packed, folded, in evaluation mode."""
    deployed = copy.deepcopy(model).eval()
    made: dict[nn.Module, nn.Module] = {}
    for module in list(deployed.modules()):
        if isinstance(module, QuantLayer):
            made[module] = DeployedLayer(module)
        if isinstance(module, ActivationQuantizer):
            made[module] = DeployedActivation(module)
    for old, new in made.items():
        if isinstance(old, QuantLayer) and old.input_quantizer is not None:
            new.add_module("input_quantizer", made[old.input_quantizer])  # which layers may share
    for old, replacement in made.items():
        new = replacement
        quantizer = getattr(old, "output_quantizer", None)
        if quantizer is not None:
            quantize_output(new, made[quantizer])
        for alias in names_of(old, deployed):
            # An output quantizer may be shared by modules of which one reads the other, as pooling.
            if isinstance(old, ActivationQuantizer) and alias.endswith("output_quantizer"):
                new = DeployedActivation(old)
            deployed.set_submodule(alias, new)
    return deployed
