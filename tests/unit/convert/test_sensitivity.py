"""Estimated sensitivities: by hand on small networks, and in the order of the measured ones."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.convert.plan import plan_conversion
from ricciq.convert.sensitivity import (
    AT_ONCE,
    Sensitivity,
    estimate_sensitivity,
    measure_sensitivity,
)
from ricciq.models.factory import load_model
from ricciq.quant.config import LSQ
from ricciq.system.journal import Journal


def estimate(model: nn.Module, images: Tensor, names: list[str]) -> list[Sensitivity]:
    plan = plan_conversion(model, images[:1], 4, 4, 8)
    return estimate_sensitivity(model, plan, names, LSQ, [images], Journal())


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """Its middle layer runs twice; what it reads and returns may be changed in place."""

    in_place = True

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.middle = nn.Conv2d(6, 6, 1)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.in_place:
            x += self.middle(x).relu_()
        else:
            x = x + self.middle(x).relu()
        return self.last((x + self.middle(x)).mean((2, 3)))


def by_hand(model: Small, images: Tensor, bits: int) -> float:
    """Half the mean of (gᵀ d)², one image after the other, with the classes that are drawn."""
    chance = torch.Generator().manual_seed(0)
    weight = model.middle.weight.detach()
    change = LSQ.quantizer_for(weight, bits)(weight).detach() - weight
    lost = 0.0
    for part in torch.split(images, AT_ONCE):
        drawn = torch.multinomial(model(part).detach().softmax(1), 1, generator=chance)[:, 0]
        for image, label in zip(part, drawn, strict=True):
            # The gradient with respect to the weight has both calls in it.
            loss = F.cross_entropy(model(image[None]), label[None])
            (gradient,) = torch.autograd.grad(loss, model.middle.weight)
            lost += float((gradient * change).sum().double() ** 2) / 2
    return lost / len(images)


def test_it_is_the_fisher_information_in_the_direction_of_the_rounding_errors() -> None:
    torch.manual_seed(0)
    model = Small().eval()
    images = noise(20, 3, 6, 6)
    (found,) = estimate(model, images, ["middle"])
    model.in_place = False  # which autograd refuses where weights have gradients
    assert found.parameters == 36
    least = float("inf")
    for bits, lost in found.divergence.items():
        least = min(least, by_hand(model, images, bits))
        assert lost == pytest.approx(least, rel=1e-3)


class Lending(nn.Module):
    """Uses the weight of a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, weight=self.qkv.weight)


def test_a_weight_that_a_parent_uses_counts_as_if_its_layer_ran() -> None:
    torch.manual_seed(0)
    lent = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Lending(), nn.Linear(8, 4))
    plain = nn.Sequential(lent[0], lent[1], lent[2].qkv, lent[3])
    (found,) = estimate(lent, noise(16, 8), ["2.qkv"])
    (expected,) = estimate(plain, noise(16, 8), ["2"])
    assert found.divergence == pytest.approx(expected.divergence)
    assert found.divergence[1] > 0


def test_the_float_model_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = Small().train()
    model.first.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    first = estimate(model, noise(10, 3, 6, 6), ["middle"])
    assert estimate(model, noise(10, 3, 6, 6), ["middle"]) == first
    assert model.training
    for (name, one), other in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad == (name != "first.weight")
        assert one.grad is None
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_resnet8", "fashion_resnet8"])
def test_layers_and_widths_rank_as_if_they_were_measured(name: str) -> None:
    loaded = load_model(name, num_classes=10, channels=1, input_size=None)
    model = loaded.model.eval()
    size = loaded.preprocessing.input_size[1]
    images = 0.5 * noise(256, 1, size, size)
    plan = plan_conversion(model, images[:1], 4, 4, 8)
    names = [layer.name for layer in plan.layers[1:-1]]
    measured = measure_sensitivity(model, plan, names, LSQ, [images], Journal())
    estimated = estimate_sensitivity(model, plan, names, LSQ, [images], Journal())
    ranks = [
        [lost for layer in found for lost in layer.divergence.values()]
        for found in (measured, estimated)
    ]
    assert spearmanr(*ranks).statistic > 0.9
