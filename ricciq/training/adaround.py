"""Learned rounding: AdaRound (Nagel et al. 2020, arXiv 2004.10568)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ricciq.layers.base import QuantLayer
from ricciq.layers.rows import outputs

BATCH = 1024
"""Most outputs in an optimizer step."""
LEARNING_RATE = 1e-2
STRETCH = 0.1
"""How far the sigmoid extends beyond 0 and 1, so that both can be reached."""
PENALTY = 0.01
WARM_UP = 0.2
"""Part of the optimizer steps before the penalty pushes roundings to 0 or 1."""


class _Rounding(nn.Module):
    """A weight each of whose codes is one of two neighbours, or between them."""

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

    def forward(self) -> Tensor:
        """The weight between its neighbouring levels."""
        return (self.floor + self.share).clamp(self.low, self.high) * self.scale

    def indecision(self, sharpness: float) -> Tensor:
        """The sum over codes of 1 for one halfway and 0 for one at a neighbour."""
        return (1 - (2 * self.share - 1).abs().pow(sharpness)).sum()

    def levels(self) -> Tensor:
        """The weight at the nearer neighbour of each code."""
        return (self.floor + (self.share >= 0.5)).clamp(self.low, self.high) * self.scale


def learn_rounding(layer: QuantLayer, rows: Tensor, wanted: Tensor, steps: int) -> None:
    """Choose between the two levels beside each weight, in place.

    The squared distance between the layer's output and the wanted one is minimized.

    Args:
        layer: one whose weight quantizer can learn rounding; its latent weight becomes levels.
        rows: (n, groups, k) quantized inputs of n outputs, from `QuantLayer.rows_at`.
        wanted: (n, channels) the outputs behind the layer's BatchNorm.
        steps: of the optimizer.
    """
    rounding = _Rounding(layer)
    optimizer = torch.optim.Adam([rounding.logit], lr=LEARNING_RATE)
    order = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(0))
    count = math.ceil(len(wanted) / BATCH)
    batches = [torch.chunk(x[order.to(x.device)], count) for x in (rows, wanted)]
    unit = wanted.square().mean().clamp_min(1e-12)
    factor, shift = (vector.to(wanted) for vector in layer.affine())
    with torch.enable_grad():
        for step in range(steps):
            given, goal = (parts[step % count] for parts in batches)
            found = outputs(given, rounding()) * factor + shift
            loss = (found - goal).square().mean() / unit
            progress = (step / steps - WARM_UP) / (1 - WARM_UP)
            if progress >= 0:  # the exponent falls from 20 to 2, so that codes are decided late
                sharpness = 2 + 9 * (1 + math.cos(math.pi * progress))
                loss = loss + PENALTY * rounding.indecision(sharpness) / rounding.logit.numel()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        layer.latent.copy_(rounding.levels())
