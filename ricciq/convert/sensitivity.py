"""How much each layer minds fewer bits: what the network's answers lose when one alone has them."""

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
"""Those a layer may be given; 7 bits take as much room in a file as 8."""


class Sensitivity(NamedTuple):
    """What the widths of one layer cost.

    Attributes:
        name: of the layer.
        parameters: how many weights it has.
        divergence: by width, nats; not rising with it.
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
    """Round the weights of one layer after the other to each width, all else in float.

    Args:
        model: the float model; stays as it is.
        plan: what becomes discrete in it.
        names: which layers to measure.
        config: which quantizers.
        batches: (B, C, H, W) calibration pictures on the model's device.
        journal: where progress is shown.

    Returns:
        For each layer the mean Kullback-Leibler divergence of the answers from the float model's:
        what distillation starts from, and what ZeroQ measures (Cai et al. 2020, arXiv 2001.00281).
    """
    widths = widths_of(config)
    net = convert(copy.deepcopy(model), plan, config)
    layers = list(quantized_layers(net).values())
    for module in net.modules():
        if isinstance(module, ActivationQuantizer):
            module.observer = _ignore  # which leaves the activations float
    standardize = {layer: layer.weight_quantizer.layer_standardize for layer in layers}
    for layer in layers:
        layer.pass_weight_through(standardize[layer])
    found = []
    with evaluating(net), journal.bar("sensitivity", len(names) * len(widths)) as advance:
        taught = [F.log_softmax(net(images).float(), 1) for images in batches]
        for name in names:
            layer = cast(QuantLayer, net.get_submodule(name))
            divergence: dict[int, float] = {}
            for bits in widths:
                quantizer = config.quantizer_for(layer.latent, bits, standardize[layer])
                layer.pass_weight_through(quantizer.eval())
                lost = _divergence(net, batches, taught)
                # One number more cannot make a layer worse, if not by chance.
                divergence[bits] = min([max(lost, 0.0), *divergence.values()])
                advance(lambda name=name: name)  # type: ignore[misc]
            layer.pass_weight_through(standardize[layer])
            found.append(Sensitivity(name, layer.latent.numel(), divergence))
    return found


def widths_of(config: QuantizerConfig) -> list[int]:
    """Those of `WIDTHS` that the quantizers of weights have."""
    return [bits for bits in WIDTHS if bits in config.weight_widths]


def _ignore(x: Tensor) -> None:
    pass


def _divergence(net: nn.Module, batches: Sequence[Tensor], taught: Sequence[Tensor]) -> float:
    lost = 0.0
    for images, logs in zip(batches, taught, strict=True):
        answers = F.log_softmax(net(images).float(), 1)
        lost += F.kl_div(answers, logs, reduction="sum", log_target=True).item()
    return lost / sum(map(len, batches))
