"""Scales and biases of all layers tuned together.

Fitted one by one, each layer passes what is left of its error on to the next. Here all of them are
tuned to what the float network returns at its end. The codes of the weights stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ricciq.evaluation import evaluating
from ricciq.layers.base import QuantLayer
from ricciq.networks import logits_of
from ricciq.quant.activation import ActivationQuantizer
from ricciq.system.journal import Journal

LEARNING_RATE = 1e-2
"""Of the scales' logarithms; of biases, it is in units of the standard deviation of the layer's
output."""
BATCH = 32
"""Images of an optimizer step."""
CHUNK = 16
"""Images in a forward pass. With fewer, a single thread of torch computes pointwise convolutions by
a slower kernel."""


class _Scaled(nn.Module):
    """A discrete weight whose codes stay, times a gain for each row.

    The gain stays 1 where scales follow from the weight by another rule, or the weight is shared.
    Where it does not, the latent weight becomes the discrete one in the end.
    """

    def __init__(self, layer: QuantLayer, is_shared: bool) -> None:
        super().__init__()
        self.layer, self.quantizer = [layer], layer.weight_quantizer  # not as its child
        self.weight: Tensor = self.quantizer(layer.latent).detach()
        learned = self.quantizer.learns_scale and self.quantizer.why_not_frozen is None
        rows = torch.zeros_like(self.quantizer.log_scale)
        self.log_gain = nn.Parameter(rows, requires_grad=learned and not is_shared)

    @property
    def gain(self) -> Tensor:
        """(rows, 1, ...)."""
        return self.log_gain.exp().view(-1, *[1] * (self.weight.dim() - 1))

    def forward(self, latent: Tensor) -> Tensor:  # noqa: ARG002
        """The weight, whatever its latent form is."""
        return self.weight * self.gain

    @torch.no_grad()
    def settle(self) -> None:
        """Give the layer its quantizer back, with the scales that were found."""
        (layer,) = self.layer
        layer.pass_weight_through(self.quantizer)
        if self.log_gain.requires_grad:
            layer.latent.copy_(self.weight * self.gain)
            self.quantizer.log_scale.add_(self.log_gain)


def tune(model: nn.Module, images: Tensor, wanted: Tensor, steps: int, journal: Journal) -> None:
    """Tune scales of weights and activations, and biases, in place.

    Their squared distance at the network's output is minimized. If it is no smaller in the end, all
    stay as they were, and so do scales that a quantizer does not learn, and biases of layers that
    are not called.

    Args:
        model: converted and calibrated.
        images: (B, C, H, W).
        wanted: (B, classes) what the float network returns for them.
        steps: of the optimizer.
        journal: shows progress.
    """
    with evaluating(model):
        units = _output_units(model, images[:CHUNK])
        with _tuned(model, units) as groups:
            if groups:
                _minimize(model, groups, images, wanted, steps, journal)


def _minimize(
    model: nn.Module,
    groups: list[dict[str, Any]],
    images: Tensor,
    wanted: Tensor,
    steps: int,
    journal: Journal,
) -> None:
    parameters = [parameter for group in groups for parameter in group["params"]]
    start = [parameter.detach().clone() for parameter in parameters]
    unit = wanted.var().clamp_min(torch.finfo(wanted.dtype).tiny)
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    chance = torch.Generator().manual_seed(0)
    before = _distance(model, images, wanted)
    with journal.bar("tuning", steps) as advance, torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            chosen = torch.randperm(len(images), generator=chance)[:BATCH].to(images.device)
            for part in torch.split(chosen, CHUNK):
                distance = (logits_of(model(images[part])) - wanted[part]).square().sum()
                loss = distance / unit / wanted[chosen].numel()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            advance(lambda: "")
    if not _distance(model, images, wanted) < before:
        for parameter, value in zip(parameters, start, strict=True):
            parameter.data.copy_(value)


@torch.no_grad()
def _distance(model: nn.Module, images: Tensor, wanted: Tensor) -> float:
    parts = zip(torch.split(images, CHUNK), torch.split(wanted, CHUNK), strict=True)
    return float(sum((logits_of(model(some)) - goal).square().sum() for some, goal in parts))


@torch.no_grad()
def _output_units(model: nn.Module, images: Tensor) -> dict[QuantLayer, float]:
    """The standard deviation of each layer's output: what steps of its bias are measured in."""
    found: dict[QuantLayer, float] = {}

    def note(layer: QuantLayer, args: Any, output: Tensor) -> None:  # noqa: ARG001
        found[layer] = float(output.std(correction=0))

    with ExitStack() as hooks:
        for layer in _layers(model):
            hooks.callback(layer.register_forward_hook(note).remove)
        model(images)
    return found


def _layers(model: nn.Module) -> list[QuantLayer]:
    return [module for module in model.modules() if isinstance(module, QuantLayer)]


@contextmanager
def _tuned(model: nn.Module, units: Mapping[QuantLayer, float]) -> Iterator[list[dict[str, Any]]]:
    """Groups of what is tuned, with their learning rates; nothing else has gradients meanwhile."""
    layers = _layers(model)
    activations = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    uses = Counter(layer.latent for layer in layers)
    scaled = [_Scaled(layer, uses[layer.latent] > 1) for layer in layers]
    scales = [item.log_gain for item in scaled if item.log_gain.requires_grad]
    scales += [quantizer.log_scale for quantizer in activations if quantizer.learns_scale]
    rates = dict.fromkeys(scales, LEARNING_RATE)
    for layer, unit in units.items():
        if isinstance(layer.last_bias, nn.Parameter):
            rates.setdefault(layer.last_bias, LEARNING_RATE * unit)
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for layer, item in zip(layers, scaled, strict=True):
            layer.pass_weight_through(item)
        for parameter in before:
            parameter.requires_grad_(False)
        for parameter in rates:
            parameter.requires_grad_(True)
        yield [{"params": [parameter], "lr": rate} for parameter, rate in rates.items()]
    finally:
        for item in scaled:
            item.settle()
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
