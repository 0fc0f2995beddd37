"""The study's nets in Brevitas, quantized as in LSQ: learned scales that start at the least error.

Needs Brevitas; it shares only `ricciq.models.bundled` with ricciq.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from brevitas.inject.enum import ScalingImplType, ScalingPerOutputType, StatsOp
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloatMSE,
    SignedBinaryWeightPerTensorConst,
    Uint8ActPerTensorFloatMSE,
)
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "support"))

from brevitas_layers import replace_layers

STATISTICS = 10
"""Steps in which Brevitas observes activations before their scales are learned (default: 300)."""


class Weights(Int8WeightPerChannelFloatMSE):
    """A learned scale per channel, and all codes of two's complement, as in ricciq."""

    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    narrow_range = False


class Signs(SignedBinaryWeightPerTensorConst):
    """One-bit weights: a learned scale per channel that starts at the mean |w|, the least error."""

    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    scaling_stats_op = StatsOp.AVE
    scaling_per_output_type = ScalingPerOutputType.CHANNEL


class Inputs(Uint8ActPerTensorFloatMSE):
    """A learned scale per tensor, for activations that are never negative."""

    collect_stats_steps = STATISTICS


class Images(Int8ActPerTensorFloat):
    """A learned scale per tensor, for the signed pixels."""

    collect_stats_steps = STATISTICS


def discretize(model: nn.Module, weight_bits: int, act_bits: int, edge_bits: int = 8) -> None:
    """Replace convolutions and linear layers in place; they keep their float weights.

    Args:
        model: a float net of the study.
        weight_bits: of weights.
        act_bits: of activations.
        edge_bits: of both, in the first and the last layer.
    """

    def quantizers(index: int, count: int) -> dict[str, Any]:
        at_edge = index in (0, count - 1)
        bits = edge_bits if at_edge else weight_bits
        return {
            "weight_quant": Signs if bits == 1 else Weights,
            "weight_bit_width": bits,
            "input_quant": Inputs if index else Images,
            "input_bit_width": edge_bits if at_edge else act_bits,
        }

    replace_layers(model, quantizers)
