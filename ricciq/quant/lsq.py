"""Learned scales: LSQ (Esser et al. 2020, arXiv 1902.08153)."""

from __future__ import annotations

from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.weight import WeightQuantizer


class LSQWeights(WeightQuantizer):
    """Weights with a learned scale for each output channel."""


class LSQActivations(ActivationQuantizer):
    """Activations with a learned scale."""
