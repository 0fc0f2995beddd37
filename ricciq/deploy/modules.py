"""Deployed layers: packed codes, steps and integer biases, BatchNorm folded in.

They run in torch, which is what an exported file is compared with, and describe themselves to the
exporter as standard ONNX operators.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.deploy.packing import Plane, pack, unpack
from ricciq.layers.base import IntegerWeights, QuantLayer, names_of
from ricciq.layers.conv import QuantConv2d
from ricciq.layers.linear import QuantLinear, QuantLinearWeight
from ricciq.layers.points import quantize_output
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.weight import WeightQuantizer

OPSET = 18


def _node(
    operator: str,
    inputs: list[Tensor],
    dtype: torch.dtype,
    shape: Any,
    attributes: dict[str, Any] | None = None,
) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        operator, inputs, attributes or {}, dtype=dtype, shape=list(shape), version=OPSET
    )
    return result


def in_float(x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """What a `DeployedActivation` makes of x, by Div, Round, Clip and Mul.

    Args:
        x: of any shape.
        scale: of its grid.
        zero_point: the code of zero, uint8.
        low: the lowest code, uint8.
        high: the highest code, uint8.

    Returns:
        The same shape as x.
    """
    zero = zero_point.float()
    codes = ((x / scale).round() + zero).clamp(low.float(), high.float())
    return (codes - zero) * scale


class DeployedActivation(nn.Module):
    """QuantizeLinear to uint8, Clip to the width's codes, DequantizeLinear."""

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

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        if not torch.onnx.is_in_onnx_export():
            return in_float(x, self.scale, self.zero_point, self.lowest, self.highest)
        quantized = [self.scale, self.zero_point]
        codes = _node("QuantizeLinear", [x, *quantized], torch.uint8, x.shape)
        if self.bits < 8:  # between the two: a Clip in front would keep the kernels float
            codes = _node("Clip", [codes, self.lowest, self.highest], torch.uint8, x.shape)
        return _node("DequantizeLinear", [codes, *quantized], torch.float32, x.shape)


class DeployedWeight(nn.Module):
    """Packed codes -> table lookup -> reshape -> DequantizeLinear for each output channel.

    onnxruntime computes all but the last step once, when it loads the file.

    Args:
        weights: what to hold.
        quantizer: whose grid and width its codes are of.
        axis: which axis output channels take: 0, or 1 for the transpose of a linear layer's weight.
        zero_points: whether to spell out that they are zero, as onnxruntime wants for a Gemm.
    """

    scale: Tensor
    zero_point: Tensor | None
    sign: Tensor | None

    def __init__(
        self,
        weights: IntegerWeights,
        quantizer: WeightQuantizer,
        axis: int = 0,
        zero_points: bool = False,
    ) -> None:
        super().__init__()
        codes, flip = weights.codes, weights.flip.view(-1, *[1] * (weights.codes.dim() - 1))
        grid, bits = quantizer.grid, quantizer.bits
        if grid.symmetric:  # a row that a negative BatchNorm weight turns around
            codes, flip = torch.where(flip, -codes, codes), torch.zeros_like(flip)
        if axis == 1:
            codes, flip = codes.t().contiguous(), flip.t()
        self.axis, self.shape = axis, list(codes.shape)
        self.register_buffer("scale", weights.scale)
        zeros = torch.zeros_like(weights.scale, dtype=torch.int8) if zero_points else None
        self.register_buffer("zero_point", zeros)
        self.register_buffer("sign", 1 - 2 * flip.to(torch.int32) if flip.any() else None)
        self.planes = 0
        if bits == 8:
            self.register_buffer("codes", codes)
            return
        for plane in pack(codes.cpu(), bits, grid):
            self.register_buffer(f"packed{self.planes}", plane.data)
            self.register_buffer(f"table{self.planes}", plane.table * weights.stretch)
            self.planes += 1
        self.to(codes.device)
        if self.planes == 1 and self.sign is None:
            self.register_buffer("table0", self.get_buffer("table0").to(torch.int8))

    def forward(self) -> Tensor:
        """The dequantized weight."""
        if torch.onnx.is_in_onnx_export():
            operands = [self._unpacking_nodes(), self.scale]
            if self.zero_point is not None:
                operands.append(self.zero_point)
            axis = {"axis": self.axis}
            return _node("DequantizeLinear", operands, torch.float32, self.shape, axis)
        behind = len(self.shape) - 1 - self.axis
        return self.integer_codes() * self.scale.view(-1, *[1] * behind)

    def integer_codes(self) -> Tensor:
        """The codes that the kernels see: stretched, signs applied."""
        if not self.planes:
            return self.get_buffer("codes")
        codes = unpack(self._plane_list(), _count(self.shape)).view(self.shape)
        return codes if self.sign is None else codes * self.sign

    def _plane_list(self) -> list[Plane]:
        return [
            Plane(self.get_buffer(f"packed{i}"), self.get_buffer(f"table{i}"))
            for i in range(self.planes)
        ]

    def _unpacking_nodes(self) -> Tensor:
        if not self.planes:
            return self.get_buffer("codes")
        count = _count(self.shape)
        total: Tensor | None = None
        for plane in self._plane_list():
            kind, per_byte = plane.table.dtype, plane.table.shape[1]
            size = [len(plane.data), per_byte]
            int32 = {"to": ir.DataType.INT32.value}
            index = _node("Cast", [plane.data], torch.int32, plane.data.shape, int32)
            part = _node("Gather", [plane.table, index], kind, size, {"axis": 0})
            if size[0] * per_byte != count:  # the last byte is not full
                flat = torch.tensor([-1])
                part = _node("Reshape", [part, flat], kind, [size[0] * per_byte])
                ends = [torch.tensor([0]), torch.tensor([count])]
                part = _node("Slice", [part, *ends], kind, [count])
            part = _node("Reshape", [part, torch.tensor(self.shape)], kind, self.shape)
            total = part if total is None else _node("Add", [total, part], kind, self.shape)
        assert total is not None
        if self.sign is not None:
            total = _node("Mul", [total, self.sign], torch.int32, self.shape)
        if total.dtype == torch.int8:
            return total
        return _node("Cast", [total], torch.int8, self.shape, {"to": ir.DataType.INT8.value})


def _count(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


class DeployedLayer(nn.Module):
    """What deployed layers share: quantized input, packed weight, integer bias."""

    bias: Tensor

    def __init__(self, layer: QuantLayer, axis: int = 0, zero_points: bool = False) -> None:
        super().__init__()
        self.axis = axis
        weights = layer.integer_weights()
        quantizer = layer.input_quantizer
        self.input_quantizer = None if quantizer is None else DeployedActivation(quantizer)
        self.weight_quantizer: nn.Module = DeployedWeight(
            weights, layer.weight_quantizer, axis, zero_points
        )
        self.register_buffer("bias", weights.bias)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, (rows, ...): some models read it, if only for its device."""
        weight: Tensor = self.weight_quantizer()
        return weight.t() if self.axis == 1 else weight

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return x, self.weight_quantizer(), self.float_bias()

    def float_bias(self) -> Tensor:
        """(rows,) float32: the integer bias times the steps of input and weight."""
        bias = self.bias
        if bias.is_floating_point():
            return bias
        assert isinstance(self.input_quantizer, DeployedActivation)
        assert isinstance(self.weight_quantizer, DeployedWeight)
        steps = [self.input_quantizer.scale, self.weight_quantizer.scale]
        if not torch.onnx.is_in_onnx_export():
            return bias * (steps[0] * steps[1])
        # onnxruntime multiplies the steps once, when it loads the file, which is smaller for it.
        step = _node("Mul", steps, torch.float32, bias.shape)
        return _node("DequantizeLinear", [bias, step], torch.float32, bias.shape, {"axis": 0})


class DeployedConv2d(DeployedLayer):
    """A QuantConv2d with its BatchNorm folded into packed weights and an integer bias."""

    def __init__(self, layer: QuantConv2d) -> None:
        super().__init__(layer)
        self.window, self.groups = layer.window, layer.groups
        # Some models look at these when they run.
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation = layer.padding, layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, rows, H', W')."""
        x, weight, bias = self._operands(x)
        window = self.window
        left, right, top, bottom = edges = window.edges(x.shape[2:])
        if not torch.onnx.is_in_onnx_export():
            padded = F.pad(x, edges)
            return F.conv2d(padded, weight, bias, window.stride, 0, window.dilation, self.groups)
        # As one operator: a Pad in front of it would keep the kernel float.
        attributes = {
            "pads": [top, left, bottom, right],
            "strides": list(window.stride),
            "dilations": list(window.dilation),
            "group": self.groups,
        }
        shape = [x.shape[0], len(weight), *window.output_size(x.shape[2:])]
        return _node("Conv", [x, weight, bias], torch.float32, shape, attributes)


class DeployedLinear(DeployedLayer):
    """A QuantLinear with packed weights, stored as (in_features, out_features), and biases."""

    def __init__(self, layer: QuantLinear) -> None:
        # Transposed already: onnxruntime would do it in float, and hold on to that memory.
        super().__init__(layer, axis=1, zero_points=True)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        x, weight, bias = self._operands(x)
        shape = [*x.shape[:-1], len(bias)]
        if not torch.onnx.is_in_onnx_export():
            return F.linear(x, weight.t(), bias)
        if x.dim() == 2:
            return _node("Gemm", [x, weight, bias], torch.float32, shape)
        product = _node("MatMul", [x, weight], torch.float32, shape)
        return product + bias


class DeployedLinearWeight(DeployedLayer):
    """A QuantLinearWeight with packed weights, read by the parent's forward."""

    def __init__(self, layer: QuantLinearWeight) -> None:
        super().__init__(layer, zero_points=True)


_DEPLOYED: dict[type[QuantLayer], Callable[[Any], nn.Module]] = {
    QuantConv2d: DeployedConv2d,
    QuantLinear: DeployedLinear,
    QuantLinearWeight: DeployedLinearWeight,
}


def deploy(model: nn.Module) -> nn.Module:
    """A copy of a converted model as it will run: packed, folded, in evaluation mode."""
    deployed = copy.deepcopy(model).eval()
    made: dict[nn.Module, nn.Module] = {}
    for module in list(deployed.modules()):
        for kind, deployed_kind in _DEPLOYED.items():
            if isinstance(module, kind):
                made[module] = deployed_kind(module)
        if isinstance(module, ActivationQuantizer):
            made[module] = DeployedActivation(module)
    for old, new in made.items():
        point = getattr(old, "output_quantizer", None)
        if point is not None:
            quantize_output(new, made[point])
        for alias in names_of(old, deployed):
            deployed.set_submodule(alias, new)
    return deployed
