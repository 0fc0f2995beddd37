"""Layers as linear regressions: single outputs are those of the whole layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from ricciq.layers.registry import kind_of
from ricciq.layers.rows import outputs, random_places, values_at

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 5), (4, 6)),
    (nn.Linear(6, 5), (4, 3, 7, 6)),
    (nn.Conv1d(6, 4, 3, stride=2, padding=1, groups=2), (4, 6, 11)),
    (nn.Conv2d(3, 8, 3, padding=1), (4, 3, 9, 7)),
    (nn.Conv2d(3, 8, (5, 3), (2, 1), (3, 0), (1, 2)), (4, 3, 12, 9)),
    (nn.Conv2d(6, 6, 3, groups=6, stride=2, padding=(0, 1)), (4, 6, 8, 9)),
    (nn.Conv2d(6, 9, 2, groups=3, padding="same"), (4, 6, 8, 9)),
    (Conv2dSame(3, 8, 3, stride=2), (4, 3, 8, 7)),
    (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), (4, 6, 5, 4)),
    (nn.ConvTranspose2d(6, 4, (2, 3), (3, 2), groups=2, dilation=(2, 1)), (4, 6, 5, 4)),
]


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=str)
def test_single_outputs_are_those_of_the_layer(module: nn.Module, shape: Any) -> None:
    kind = kind_of(module, lent=False)
    assert kind is not None
    layer = kind.from_float(module, 8, 32).eval()
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=chance)
    weight: Tensor = layer.weight_quantizer(layer.latent)
    with torch.no_grad():
        whole = layer(x)
    place = random_places(whole.shape, layer.channel_axis, 20, chance)
    single = outputs(layer.rows_at(x, place), weight)
    expected = values_at(whole, layer.channel_axis, place)
    assert layer.bias is not None
    torch.testing.assert_close(single + layer.bias, expected)
    assert len(expected) == min(20, whole.numel() // whole.shape[layer.channel_axis])


def test_places_do_not_repeat_and_reach_everywhere() -> None:
    place = random_places((3, 7, 4, 5), 1, 1000, torch.Generator().manual_seed(0))
    assert len(place[0]) == 3 * 20
    assert len(set(zip(*(index.tolist() for index in place), strict=True))) == 3 * 20
