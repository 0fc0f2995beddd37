"""Which quantizers compute codes from integers, and which must not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ricciq.convert.rewrite import quantize
from ricciq.deploy.links import link
from ricciq.deploy.modules import DeployedActivation, Kept, deploy
from ricciq.quant.calibration import calibrate

SIZE = (3, 8, 8)


class Net(nn.Module):
    """Two branches that are added, pooled by a function, and classified."""

    def __init__(self, pool: Callable[[Tensor], Tensor], twice: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.last_act = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 4)
        self.pool, self.twice = pool, twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        if self.twice:
            x = self.left(self.left(x))
        x = self.last_act(self.left(x) + self.right(x))
        return self.head(self.pool(x))


POOLS = {
    "mean": lambda x: x.mean((2, 3)),
    "kept": lambda x: x.mean((2, 3), keepdim=True).flatten(1),
    "others": lambda x: x.mean((1, 2)),  # width and channels, of the same number
    "half": lambda x: x.mean(2).mean(2),
    "largest": lambda x: x.amax((2, 3)),
}


def linked(pool: str, twice: bool = False) -> tuple[dict[str, str], nn.Module, nn.Module, Tensor]:
    """The kind of each quantizer's source, the model linked and not, and images."""
    torch.manual_seed(0)
    model = Net(POOLS[pool], twice).eval()
    images = torch.randn(16, *SIZE)
    quantize(model, images[:1], 8, 8)
    calibrate(model, [images])
    plain = deploy(model)
    joined = link(copy.deepcopy(plain), SIZE).model
    sources = {
        name: type(module.source).__name__
        for name, module in joined.named_modules()
        if isinstance(module, DeployedActivation)
    }
    return sources, joined, plain, images


@pytest.mark.parametrize("pool", POOLS)
def test_linked_or_not_a_model_computes_the_same_but_for_ties(pool: str) -> None:
    sources, joined, plain, images = linked(pool)
    with torch.no_grad():
        expected = plain(images)
        for _ in range(2):  # nothing is left from the first
            torch.testing.assert_close(joined(images), expected, atol=0.05, rtol=0)
    assert sources["head.input_quantizer"] == (
        "_Average" if pool in ("mean", "kept") else "NoneType"
    )
    assert sources["left.output_quantizer"] == sources["right.output_quantizer"] == "_Layer"


def test_a_layer_that_runs_twice_is_not_linked() -> None:
    sources, joined, plain, images = linked("mean", twice=True)
    assert sources["left.input_quantizer"] == "NoneType"
    with torch.no_grad():
        torch.testing.assert_close(joined(images), plain(images), atol=0.05, rtol=0)


def test_no_tensor_is_kept_after_a_forward_pass() -> None:
    _, joined, _, images = linked("mean")
    with torch.no_grad():
        joined(images)
    for module in joined.modules():
        for name in ("codes", "sums"):
            kept = getattr(module, name, None)
            assert not isinstance(kept, Kept) or kept._value is None


def test_a_float_model_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    assert link(model, SIZE) == (model, None)


def float_from(model: nn.Module, act_bits: int = 8) -> str | None:
    """The first layer that follows a float kernel."""
    images = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(0))
    quantize(model.eval(), images[:1], 8, act_bits)
    calibrate(model, [images])
    return link(deploy(model), SIZE).float_from


@pytest.mark.parametrize("pool", POOLS)
def test_codes_are_equal_up_to_pooling_in_float(pool: str) -> None:
    exact = pool in ("mean", "kept")
    # The largest number of a channel is exact, too, but not among what is known to be.
    assert float_from(Net(POOLS[pool])) == (None if exact else "head")


def layers(*between: nn.Module) -> nn.Sequential:
    """Two convolutions and a head, with modules between the convolutions."""
    torch.manual_seed(0)
    head = nn.Flatten(), nn.Linear(8 * 64, 2)
    return nn.Sequential(nn.Conv2d(3, 8, 1), *between, nn.Conv2d(8, 8, 1), nn.ReLU(), *head)


def test_the_first_layer_behind_a_float_kernel_is_named() -> None:
    assert float_from(layers()) is None
    assert float_from(layers(nn.ReLU6())) is None
    assert float_from(layers(nn.MaxPool2d(3, 1, 1))) is None
    assert float_from(layers(nn.Hardswish())) == "2"
    assert float_from(layers(nn.GELU())) == "2"
    assert float_from(layers(nn.ConvTranspose2d(8, 8, 1))) == "1"
    assert float_from(nn.Sequential(layers(), nn.Softmax(1))) is None  # no code is behind it


class Assigned(nn.Module):
    """Writes what is computed in float into a part of what a layer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        part = torch.sigmoid(x[:, 4:])
        x = x.clone()
        x[:, :4] = part
        return self.second(x).mean((2, 3))


def test_a_tensor_that_is_written_to_is_not_taken_for_the_input() -> None:
    assert float_from(Assigned()) == "second"


def test_with_float_activations_the_first_layer_is_named() -> None:
    assert float_from(layers(), act_bits=32) == "0"
