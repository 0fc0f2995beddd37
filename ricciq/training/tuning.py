"""Scales and biases of all layers tuned together, where so few bits leave an error at the end.

Layer by layer, each is fitted to what its own float layer returns, and what is left of its error
reaches the next. Here all of them are tuned to what the float network returns at its end. The codes
of the weights stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ricciq.evaluation import evaluating
from ricciq.layers.base import QuantLayer
from ricciq.quant.activation import ActivationQuantizer
from ricciq.system.journal import Journal

LEARNING_RATE = 1e-2
BATCH, CHUNK = 32, 16
"""Images of an optimizer step, and those that are in memory at a time."""


class _Scaled(nn.Module):
    """A discrete weight whose codes stay, times a gain for each row.

    The gain stays 1 where scales follow from the weight by another rule, or the weight is shared.
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
            layer.latent.mul_(self.gain)
            self.quantizer.log_scale.add_(self.log_gain)


def tune(model: nn.Module, images: Tensor, wanted: Tensor, steps: int, journal: Journal) -> None:
    """Tune scales of weights and activations, and biases, in place.

    Their squared distance at the network's output is minimized. Scales that a quantizer does not
    learn stay.

    Args:
        model: converted and calibrated.
        images: (B, C, H, W).
        wanted: (B, classes) what the float network returns for them.
        steps: of the optimizer.
        journal: shows progress.
    """
    with _tuned(model) as parameters, evaluating(model), torch.enable_grad():
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        chance = torch.Generator().manual_seed(0)
        with journal.bar("tuning", steps) as advance:
            for _ in range(steps):
                optimizer.zero_grad()
                chosen = torch.randperm(len(images), generator=chance)[:BATCH].to(images.device)
                for part in torch.split(chosen, CHUNK):
                    distance = (model(images[part]) - wanted[part]).square().sum()
                    (distance / wanted[chosen].numel()).backward()
                optimizer.step()
                schedule.step()
                advance(lambda: "")


@contextmanager
def _tuned(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """What is tuned; nothing else has gradients meanwhile."""
    layers = [module for module in model.modules() if isinstance(module, QuantLayer)]
    activations = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    uses = Counter(layer.latent for layer in layers)
    scaled = [_Scaled(layer, uses[layer.latent] > 1) for layer in layers]
    biases = [layer.bias if layer.norm is None else layer.norm.bias for layer in layers]
    found = [item.log_gain for item in scaled if item.log_gain.requires_grad]
    found += [quantizer.log_scale for quantizer in activations if quantizer.learns_scale]
    found += [bias for bias in biases if isinstance(bias, nn.Parameter)]
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for layer, item in zip(layers, scaled, strict=True):
            layer.pass_weight_through(item)
        for parameter in before:
            parameter.requires_grad_(False)
        for parameter in found:
            parameter.requires_grad_(True)
        yield found
    finally:
        for item in scaled:
            item.settle()
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
