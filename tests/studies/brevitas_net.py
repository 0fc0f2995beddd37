"""The study's nets in Brevitas, quantized as in LSQ: learned steps, first found by least error.

Needs Brevitas; `ricciq.models.bundled` is all it shares with ricciq.
"""

from __future__ import annotations

from brevitas import nn as qnn
from brevitas.inject.enum import ScalingImplType, ScalingPerOutputType, StatsOp
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloatMSE,
    SignedBinaryWeightPerTensorConst,
    Uint8ActPerTensorFloatMSE,
)
from torch import nn

STATISTICS = 10
"""Steps in which Brevitas watches activations before it learns their steps; its own are 300."""


class Weights(Int8WeightPerChannelFloatMSE):
    """A learned step a channel, and all codes of two's complement, as in ricciq."""

    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    narrow_range = False


class Signs(SignedBinaryWeightPerTensorConst):
    """Weights of one bit: a learned step a channel that begins at the mean |w|, the least error."""

    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    scaling_stats_op = StatsOp.AVE
    scaling_per_output_type = ScalingPerOutputType.CHANNEL


class Inputs(Uint8ActPerTensorFloatMSE):
    """A learned step a tensor, for activations that are never negative."""

    collect_stats_steps = STATISTICS


class Pictures(Int8ActPerTensorFloat):
    """The same for the signed pixels."""

    collect_stats_steps = STATISTICS


def discretize(model: nn.Module, weight_bits: int, act_bits: int, edge_bits: int = 8) -> None:
    """Swap convolutions and linear layers in place; they keep their float weights."""
    kinds = (nn.Conv2d, nn.Linear)
    layers = [(name, m) for name, m in model.named_modules() if type(m) in kinds]
    for place, (name, layer) in enumerate(layers):
        at_edge = place in (0, len(layers) - 1)
        bits = edge_bits if at_edge else weight_bits
        quantizers = {
            "weight_quant": Signs if bits == 1 else Weights,
            "weight_bit_width": bits,
            "input_quant": Inputs if place else Pictures,
            "input_bit_width": edge_bits if at_edge else act_bits,
        }
        made: nn.Module
        if isinstance(layer, nn.Conv2d):
            made = qnn.QuantConv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
                bias=layer.bias is not None,
                **quantizers,
            )
        else:
            assert isinstance(layer, nn.Linear)
            made = qnn.QuantLinear(
                layer.in_features, layer.out_features, layer.bias is not None, **quantizers
            )
        made.load_state_dict(layer.state_dict(), strict=False)
        model.set_submodule(name, made)
