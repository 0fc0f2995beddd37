"""Scales that stay as calibration finds them."""

from __future__ import annotations

from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.weight import WeightQuantizer


class FixedWeights(WeightQuantizer):
    """Weights with calibrated scales."""

    learns_scale = False


class FixedActivations(ActivationQuantizer):
    """Activations with a calibrated scale."""

    learns_scale = False
