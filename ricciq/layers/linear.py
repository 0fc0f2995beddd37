"""Discrete linear layers, including those whose weight is used by a parent directly."""

from __future__ import annotations

from typing import Self, cast

import torch
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.layers.base import Function, QuantLayer
from ricciq.layers.operators import onnx_operator
from ricciq.layers.registry import quantizes
from ricciq.layers.rows import Place


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The function of a linear layer: (..., in_features) -> (..., out_features).

    Args:
        x: (..., in_features).
        weight: (in_features, out_features).
        bias: (out_features,).
    """
    if not torch.onnx.is_in_onnx_export():
        return F.linear(x, weight.t(), bias)
    shape = [*x.shape[:-1], len(bias)]
    if x.dim() == 2:
        return onnx_operator("Gemm", [x, weight, bias], torch.float32, shape)
    return onnx_operator("MatMul", [x, weight], torch.float32, shape) + bias


@quantizes(nn.Linear, TimmLinear)
class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[misc]
    """A linear layer with discrete weights and inputs."""

    channel_axis = -1
    # Already transposed: onnxruntime would do it in float, and keep that memory.
    weight_axis = 1
    operators = ("Gemm", "MatMul")
    kernels = ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat")
    zero_points = True

    @classmethod
    def take_over(cls, module: nn.Module) -> Self:
        """A linear layer with the parameters of a float one."""
        linear = cast(nn.Linear, module)
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def function(self) -> Function:
        """The product with the weight."""
        return product

    def rows_at(self, x: Tensor, place: Place) -> Tensor:
        """See `QuantLayer.rows_at`."""
        return x[place].unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


@quantizes(nn.Linear, TimmLinear, lent_to="linear")
class QuantLinearWeight(QuantLayer):
    """A linear layer that is never called: its parent passes ``weight`` to `F.linear` itself.

    ``weight`` is the discrete weight. The input quantizer is attached to the parent.
    """

    operators = ("Gemm", "MatMul")
    kernels = QuantLinear.kernels
    zero_points = True

    latent_weight: Tensor

    @classmethod
    def take_over(cls, module: nn.Module) -> Self:
        """A layer with the parameters of a float one."""
        linear, layer = cast(nn.Linear, module), cls()
        layer.latent_weight, layer.bias = linear.weight, linear.bias
        return layer

    @property
    def latent(self) -> Tensor:
        """The float weight that is trained, (out_features, in_features)."""
        return self.latent_weight

    @property
    def weight(self) -> Tensor:
        """The discrete weight, (out_features, in_features)."""
        weight: Tensor = self.weight_quantizer(self.latent_weight)
        return weight
