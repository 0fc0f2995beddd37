"""Replaces the layers of a net by those of Brevitas. Needs Brevitas; shares nothing with ricciq."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from brevitas import nn as qnn
from torch import nn


def replace_layers(model: nn.Module, quantizers: Callable[[int, int], dict[str, Any]]) -> None:
    """Replace convolutions and linear layers in place.

    Args:
        model: of float layers.
        quantizers: given a layer's index and the number of layers, what Brevitas' layer is to be
            quantized with: its keyword arguments.
    """
    kinds = (nn.Conv2d, nn.Linear)
    layers = [(name, m) for name, m in model.named_modules() if type(m) in kinds]
    for index, (name, layer) in enumerate(layers):
        quantized: nn.Module
        if isinstance(layer, nn.Conv2d):
            quantized = qnn.QuantConv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
                bias=layer.bias is not None,
                **quantizers(index, len(layers)),
            )
        else:
            assert isinstance(layer, nn.Linear)
            quantized = qnn.QuantLinear(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                **quantizers(index, len(layers)),
            )
        quantized.load_state_dict(layer.state_dict(), strict=False)
        model.set_submodule(name, quantized)
