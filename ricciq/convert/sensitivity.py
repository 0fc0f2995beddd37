"""Sensitivity of the network's output to the width of each layer's weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.convert.plan import Plan
from ricciq.convert.rewrite import convert, quantized_layers
from ricciq.evaluation import evaluating
from ricciq.layers.base import QuantLayer
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.config import QuantizerConfig
from ricciq.system.journal import Journal

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
"""The widths to choose from. In a file, 7 bits take as much space as 8."""


class Sensitivity(NamedTuple):
    """What each width of one layer costs.

    Attributes:
        name: name of the layer.
        parameters: number of its weights.
        divergence: in nats, by width; it does not increase with the width.
    """

    name: str
    parameters: int
    divergence: dict[int, float]


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    plan: Plan,
    names: Sequence[str],
    config: QuantizerConfig,
    batches: Sequence[Tensor],
    journal: Journal,
) -> list[Sensitivity]:
    """Quantize the weights of one layer at a time to each width, everything else in float.

    Args:
        model: the float model; it is not changed.
        plan: the layers to quantize.
        names: the layers to measure.
        config: the quantizers.
        batches: (B, C, H, W) calibration images on the model's device.
        journal: shows progress.

    Returns:
        For each layer and width, the mean Kullback-Leibler divergence of the softmax outputs from
        those of the float model, as in ZeroQ (Cai et al. 2020, arXiv 2001.00281).
    """
    widths = widths_of(config)
    net = convert(copy.deepcopy(model), plan, config)
    layers = list(quantized_layers(net).values())
    for module in net.modules():
        if isinstance(module, ActivationQuantizer):
            module.observer = _ignore  # an observed activation stays float
    standardize = {layer: layer.weight_quantizer.layer_standardize for layer in layers}
    for layer in layers:
        layer.pass_weight_through(standardize[layer])
    found = []
    with evaluating(net), journal.bar("sensitivity", len(names) * len(widths)) as advance:
        expected = [F.log_softmax(net(images).float(), 1) for images in batches]
        for name in names:
            layer = cast(QuantLayer, net.get_submodule(name))
            divergence: dict[int, float] = {}
            for bits in widths:
                quantizer = config.quantizer_for(layer.latent, bits, standardize[layer])
                layer.pass_weight_through(quantizer.eval())
                lost = _divergence(net, batches, expected)
                # More levels make a layer worse only by chance.
                divergence[bits] = min([max(lost, 0.0), *divergence.values()])
                advance(lambda name=name: name)  # type: ignore[misc]
            layer.pass_weight_through(standardize[layer])
            found.append(Sensitivity(name, layer.latent.numel(), divergence))
    return found


def widths_of(config: QuantizerConfig) -> list[int]:
    """The widths of `WIDTHS` that the quantizers of weights support."""
    return [bits for bits in WIDTHS if bits in config.weight_widths]


def _ignore(x: Tensor) -> None:
    pass


def _divergence(net: nn.Module, batches: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    lost = 0.0
    for images, wanted in zip(batches, expected, strict=True):
        found = F.log_softmax(net(images).float(), 1)
        lost += F.kl_div(found, wanted, reduction="sum", log_target=True).item()
    return lost / sum(map(len, batches))
