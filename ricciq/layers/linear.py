"""Discrete linear layers, also those whose weight a parent uses itself."""

from __future__ import annotations

from typing import Self

from timm.layers import Linear as TimmLinear
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.layers.base import QuantLayer
from ricciq.quant.grid import Bits
from ricciq.quant.quantizer import LSQ, Kinds

LINEARS = (nn.Linear, TimmLinear)
"""The classes that `QuantLinear` stands in for."""


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
