"""Which quantizers a network uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.catalog import (
    ACTIVATIONS,
    DEFAULT_ACTIVATIONS,
    DEFAULT_WEIGHTS,
    WEIGHTS,
    check_width,
)
from ricciq.quant.grid import FLOAT_BITS, Bits
from ricciq.quant.weight import WeightQuantizer


@dataclass(frozen=True)
class QuantizerConfig:
    """Which quantizers a network uses.

    Attributes:
        weights: a name of `WEIGHTS`.
        activations: a name of `ACTIVATIONS`.
        normalize: whether each row of a weight keeps, before it is rounded, the norm it had.
        search: how many first scales are tried; 1 takes the one that clips nothing.
    """

    weights: str = DEFAULT_WEIGHTS
    activations: str = DEFAULT_ACTIVATIONS
    normalize: bool = False
    search: int = 100

    @property
    def weight_widths(self) -> tuple[Bits, ...]:
        """The widths that weights can have."""
        return WEIGHTS[self.weights].widths

    def check(self, weight_bits: Bits, act_bits: int) -> None:
        """Refuse widths that the quantizers do not have.

        Args:
            weight_bits: of weights.
            act_bits: of activations, or 32 for float.

        Raises:
            ValueError: one sentence says which width to give.
        """
        check_width("weight_quantizer", self.weights, weight_bits)
        if act_bits != FLOAT_BITS:
            check_width("act_quantizer", self.activations, act_bits)

    def quantizer_for(
        self, weight: Tensor, bits: Bits, standardize: nn.Module | None = None
    ) -> WeightQuantizer:
        """A quantizer calibrated on a weight, on its device.

        Args:
            weight: (rows, ...), as the layer stores it.
            bits: 1 to 8 or ``"ternary"``.
            standardize: what the layer does to its weight before using it.

        Raises:
            ValueError: such a quantizer has no such width.
        """
        check_width("weight_quantizer", self.weights, bits)
        kind = cast(type[WeightQuantizer], WEIGHTS[self.weights].load()).for_width(bits)
        quantizer = kind(len(weight), bits, standardize).to(weight.device)
        quantizer.calibrate(weight, self.search)
        return quantizer

    def activation_quantizer(self, bits: int) -> ActivationQuantizer:
        """A quantizer of activations, not calibrated.

        Args:
            bits: 1 to 8.

        Raises:
            ValueError: such a quantizer has no such width.
        """
        check_width("act_quantizer", self.activations, bits)
        return cast(type[ActivationQuantizer], ACTIVATIONS[self.activations].load())(bits)


LSQ = QuantizerConfig()
"""Learned scales, the default."""
