"""Weights with odd levels."""

from __future__ import annotations

from ricciq.quant.grid import Bits, UniformGrid
from ricciq.quant.weight import WeightQuantizer


class OddWeights(WeightQuantizer):
    """Weights with a learned scale per channel and, below 8 bits, levels -3, -1, 1, 3 and so on."""

    @staticmethod
    def grid_of(bits: Bits) -> UniformGrid:
        """The odd codes of a width."""
        return UniformGrid.for_weights(bits, odd=True)
