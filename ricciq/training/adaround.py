"""Quantization without training: rounding learned layer by layer, and means put right.

Each discrete layer, in the order they run, learns on calibration pictures whether to round each
weight down or up, so that its output is nearest to that of the float layer (AdaRound,
Nagel et al. 2020, arXiv 2004.10568); what is then left of a channel's mean error goes into its bias
(Nagel et al. 2019, arXiv 1906.04721, section 4.2). Labels are not needed.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from ricciq.evaluation import evaluating
from ricciq.layers.base import QuantLayer
from ricciq.quant.grid import Grid
from ricciq.system.journal import Journal

PICTURES = 256
"""How many are enough; what goes into a layer for all of them is in memory at once."""
BATCH = 32
LEARNING_RATE = 1e-2
STRETCH = 0.1
"""How far the sigmoid of a rounding reaches beyond 0 and 1, so that both can be reached."""
PENALTY = 0.01
WARM_UP = 0.2
"""Share of the steps before roundings are pushed to 0 or 1."""


def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    names: Sequence[str],
    batches: Iterable[Tensor],
    steps: int,
    journal: Journal,
) -> None:
    """Let a converted, calibrated model's layers answer as the float model's, in place.

    Weights of 8 bits, of a codebook, of odd levels or that are standardized are rounded to the
    nearest level as before; so are those of layers that only lend their weight.

    Args:
        model: converted and calibrated; the latent weights become levels.
        teacher: the float model it was.
        names: of the discrete layers, in the order they run.
        batches: (B, C, H, W) pictures on its device; `PICTURES` in all are enough.
        steps: of the optimizer, for each layer.
        journal: where progress is shown.
    """
    layers = {
        name: layer
        for name in names
        if isinstance(layer := model.get_submodule(name), QuantLayer) and layer.lent_to is None
    }
    shown = list(batches)
    with evaluating(model), evaluating(teacher), journal.bar("rounding", len(layers)) as advance:
        for name, layer in layers.items():
            exact = torch.cat(_inputs(teacher, name, shown))
            given = torch.cat(_inputs(model, name, shown))
            with torch.no_grad():
                plain = _in_float(layer)
                wanted = torch.cat([plain(part) for part in torch.split(exact, BATCH)])
            if _can_learn(layer):
                _learn_rounding(layer, given, wanted, steps)
            _correct_bias(layer, given, wanted)
            advance(lambda name=name: name)  # type: ignore[misc]


class _Reached(Exception):  # noqa: N818  no error
    pass


@torch.no_grad()
def _inputs(model: nn.Module, name: str, batches: Sequence[Tensor]) -> list[Tensor]:
    """What a layer is given for each batch; the model does not run on behind it."""
    seen: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach())
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(take)
    try:
        for images in batches:
            with suppress(_Reached):
                model(images)
    finally:
        handle.remove()
    return seen


def _in_float(layer: QuantLayer) -> nn.Module:
    """The layer with its weights and inputs as they are, and without hooks such as a point's."""
    plain = copy.copy(layer)
    plain._modules, plain._forward_hooks = dict(layer._modules), OrderedDict()
    plain._modules["weight_quantizer"] = layer.weight_quantizer.unrounded
    plain.input_quantizer = None
    return plain


def _can_learn(layer: QuantLayer) -> bool:
    quantizer = layer.weight_quantizer
    plain = isinstance(quantizer.standardize, nn.Identity) and isinstance(quantizer.grid, Grid)
    return plain and quantizer.bits != 8 and quantizer.fixed_grid.step == 1


class _Rounding(nn.Module):
    """Takes the place of a weight quantizer: every code is one of two neighbours, or between."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        quantizer = layer.weight_quantizer
        ratio = quantizer.ratio(layer.latent.detach())
        self.scale = quantizer.scale.view(-1, *[1] * (ratio.dim() - 1))
        self.low, self.high = quantizer.fixed_grid.low, quantizer.fixed_grid.high
        self.floor = ratio.floor()
        share = (ratio - self.floor + STRETCH) / (1 + 2 * STRETCH)
        self.logit = nn.Parameter((share / (1 - share)).log())

    @property
    def share(self) -> Tensor:
        """How far up each weight is rounded, 0 to 1."""
        return (self.logit.sigmoid() * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:  # noqa: ARG002
        """The weight between its neighbouring levels."""
        return (self.floor + self.share).clamp(self.low, self.high) * self.scale

    def indecision(self, sharpness: float) -> Tensor:
        """1 for each share of a half, 0 for each that is 0 or 1."""
        return (1 - (2 * self.share - 1).abs().pow(sharpness)).sum()

    def levels(self) -> Tensor:
        """The weight at the levels that were chosen."""
        return (self.floor + (self.share >= 0.5)).clamp(self.low, self.high) * self.scale


def _learn_rounding(layer: QuantLayer, given: Tensor, wanted: Tensor, steps: int) -> None:
    """Minimize the squared distance of the layer's output from the wanted one."""
    rounding = _Rounding(layer)
    optimizer = torch.optim.Adam([rounding.logit], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    unit = wanted.square().mean().clamp_min(1e-12)
    with _weight_through(layer, rounding), torch.enable_grad():
        for step in range(steps):
            chosen = torch.randint(len(given), (BATCH,), generator=generator).to(given.device)
            loss = (layer(given[chosen]) - wanted[chosen]).square().mean() / unit
            progress = (step / steps - WARM_UP) / (1 - WARM_UP)
            if progress >= 0:  # the exponent falls from 20 to 2, so that shares part late
                sharpness = 2 + 9 * (1 + math.cos(math.pi * progress))
                loss = loss + PENALTY * rounding.indecision(sharpness) / rounding.logit.numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        layer.latent.copy_(rounding.levels())


@contextmanager
def _weight_through(layer: QuantLayer, rounding: nn.Module) -> Iterator[None]:
    quantizer = layer._modules["weight_quantizer"]
    frozen = [p for p in layer.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    layer._modules["weight_quantizer"] = rounding
    try:
        yield
    finally:
        layer._modules["weight_quantizer"] = quantizer
        for parameter in frozen:
            parameter.requires_grad_(True)


@torch.no_grad()
def _correct_bias(layer: QuantLayer, given: Tensor, wanted: Tensor) -> None:
    """Take the mean error of each channel out of its bias, if it has one."""
    bias = layer.bias if layer.norm is None else layer.norm.bias
    if bias is None:
        return
    answered = torch.cat([layer(part) for part in torch.split(given, BATCH)])
    channel = layer.channel_axis % answered.dim()
    others = [axis for axis in range(answered.dim()) if axis != channel]
    bias -= (answered - wanted).mean(others)
