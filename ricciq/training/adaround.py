"""Quantization without training: learned rounding layer by layer, and bias correction.

Each discrete layer, in the order they run, learns on calibration images whether to round each
weight down or up, so that its output is close to that of the float layer (AdaRound, Nagel et al.
2020, arXiv 2004.10568). The mean error that remains in a channel is subtracted from its bias
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
from ricciq.system.journal import Journal

IMAGES = 256
"""How many images are enough; a layer's inputs for all of them are in memory at once."""
BATCH = 32
LEARNING_RATE = 1e-2
STRETCH = 0.1
"""How far the sigmoid extends beyond 0 and 1, so that both can be reached."""
PENALTY = 0.01
WARM_UP = 0.2
"""Part of the optimizer steps before the penalty pushes roundings to 0 or 1."""


def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    names: Sequence[str],
    batches: Iterable[Tensor],
    steps: int,
    journal: Journal,
) -> None:
    """Fit the outputs of a converted, calibrated model's layers to the float model's, in place.

    Rounding is learned where the quantizer can (see
    `ricciq.quant.weight.WeightQuantizer.can_learn_rounding`); other weights are rounded to the
    nearest level as before. Layers whose weight a parent uses itself are left out.

    Args:
        model: converted and calibrated; its latent weights become levels.
        teacher: the float model that it was made of.
        names: the discrete layers, in the order they run.
        batches: (B, C, H, W) images on the model's device; `IMAGES` in all are enough.
        steps: optimizer steps for each layer.
        journal: shows progress.
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
            if layer.weight_quantizer.can_learn_rounding:
                _learn_rounding(layer, given, wanted, steps)
            _correct_bias(layer, given, wanted)
            advance(lambda name=name: name)  # type: ignore[misc]


class _Reached(Exception):  # noqa: N818  no error
    pass


@torch.no_grad()
def _inputs(model: nn.Module, name: str, batches: Sequence[Tensor]) -> list[Tensor]:
    """A layer's input for each batch; the model runs no further than this layer."""
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
    """The layer with float weights and inputs, without hooks such as an output quantizer's."""
    plain = copy.copy(layer)
    plain._modules, plain._forward_hooks = dict(layer._modules), OrderedDict()
    plain.pass_weight_through(layer.weight_quantizer.layer_standardize)
    plain.input_quantizer = None
    return plain


class _Rounding(nn.Module):
    """Replaces a weight quantizer: every code is one of two neighbours, or between them."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        quantizer = layer.weight_quantizer
        ratio = quantizer.ratio(layer.latent.detach())
        self.scale = quantizer.scale.view(-1, *[1] * (ratio.dim() - 1))
        self.low, self.high = quantizer.grid.low, quantizer.grid.high
        self.floor = ratio.floor()
        share = (ratio - self.floor + STRETCH) / (1 + 2 * STRETCH)
        self.logit = nn.Parameter((share / (1 - share)).log())

    @property
    def share(self) -> Tensor:
        """The position of each code between its neighbours, 0 to 1."""
        return (self.logit.sigmoid() * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:  # noqa: ARG002
        """The weight between its neighbouring levels."""
        return (self.floor + self.share).clamp(self.low, self.high) * self.scale

    def indecision(self, sharpness: float) -> Tensor:
        """The sum over codes of 1 for one halfway and 0 for one at a neighbour."""
        return (1 - (2 * self.share - 1).abs().pow(sharpness)).sum()

    def levels(self) -> Tensor:
        """The weight at the nearer neighbour of each code."""
        return (self.floor + (self.share >= 0.5)).clamp(self.low, self.high) * self.scale


def _learn_rounding(layer: QuantLayer, given: Tensor, wanted: Tensor, steps: int) -> None:
    """Minimize the squared distance between the layer's output and the wanted one."""
    rounding = _Rounding(layer)
    optimizer = torch.optim.Adam([rounding.logit], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    unit = wanted.square().mean().clamp_min(1e-12)
    with _weight_through(layer, rounding), torch.enable_grad():
        for step in range(steps):
            chosen = torch.randint(len(given), (BATCH,), generator=generator).to(given.device)
            loss = (layer(given[chosen]) - wanted[chosen]).square().mean() / unit
            progress = (step / steps - WARM_UP) / (1 - WARM_UP)
            if progress >= 0:  # the exponent falls from 20 to 2, so that codes are decided late
                sharpness = 2 + 9 * (1 + math.cos(math.pi * progress))
                loss = loss + PENALTY * rounding.indecision(sharpness) / rounding.logit.numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        layer.latent.copy_(rounding.levels())


@contextmanager
def _weight_through(layer: QuantLayer, rounding: nn.Module) -> Iterator[None]:
    """Replace a layer's weight quantizer and freeze its other parameters within the block."""
    quantizer = layer.weight_quantizer
    frozen = [p for p in layer.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    layer.pass_weight_through(rounding)
    try:
        yield
    finally:
        layer.pass_weight_through(quantizer)
        for parameter in frozen:
            parameter.requires_grad_(True)


@torch.no_grad()
def _correct_bias(layer: QuantLayer, given: Tensor, wanted: Tensor) -> None:
    """Subtract the mean error of each channel from its bias, if it has one."""
    bias = layer.bias if layer.norm is None else layer.norm.bias
    if bias is None:
        return
    output = torch.cat([layer(part) for part in torch.split(given, BATCH)])
    channel = layer.channel_axis % output.dim()
    others = [axis for axis in range(output.dim()) if axis != channel]
    bias -= (output - wanted).mean(others)
