"""Scales and biases tuned together: what changes, what must not, and when it is done."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn

from ricciq.convert.plan import plan_conversion
from ricciq.convert.rewrite import convert, quantized_layers
from ricciq.quant.calibration import calibrate
from ricciq.quant.config import QuantizerConfig
from ricciq.system.journal import Journal
from ricciq.training import reconstruction
from ricciq.training.reconstruction import reconstruct
from ricciq.training.tuning import tune

CHANCE = torch.Generator().manual_seed(0)
IMAGES = torch.randn(96, 3, 8, 8, generator=CHANCE)
OTHERS = torch.randn(96, 3, 8, 8, generator=CHANCE)


class Net(nn.Module):
    """A convolution with BatchNorm, one whose weight is standardized, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.middle, self.standardized = nn.Conv2d(16, 16, 3), StdConv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.standardized(torch.relu(self.middle(x))))
        return self.head(x.mean((2, 3)))


def converted(bits: int, act_bits: int = 4, config: str = "lsq") -> tuple[nn.Module, nn.Module]:
    """The float network above, and its calibrated counterpart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return calibrated(Net(), bits, act_bits, config)


def calibrated(
    teacher: nn.Module, bits: int, act_bits: int = 4, config: str = "lsq"
) -> tuple[nn.Module, nn.Module]:
    """A float network, and its calibrated counterpart."""
    teacher.eval()
    plan = plan_conversion(teacher, IMAGES[:2], bits, act_bits)
    model = convert(copy.deepcopy(teacher), plan, QuantizerConfig(config, config))
    calibrate(model, [IMAGES])
    return teacher, model.eval()


@torch.no_grad()
def distance(model: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    return float((model(images) - teacher(images)).square().mean())


@torch.no_grad()
def codes(model: nn.Module) -> dict[str, Tensor]:
    layers = quantized_layers(model).items()
    return {name: layer.weight_quantizer.codes(layer.latent) for name, layer in layers}


def test_the_output_comes_nearer_and_codes_stay() -> None:
    teacher, model = converted(2)
    before, far = codes(model), distance(model, teacher, OTHERS)
    scales = {n: m.weight_quantizer.scale for n, m in quantized_layers(model).items()}
    tune(model, IMAGES, teacher(IMAGES).detach(), 100, Journal())
    assert distance(model, teacher, OTHERS) < 0.7 * far
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.weight_quantizer.codes(layer.latent), before[name])
        same = torch.equal(layer.weight_quantizer.scale, scales[name])
        assert same == (name == "standardized")  # its weight does not follow its latent form


def test_what_is_fixed_stays() -> None:
    teacher, model = converted(2, config="fixed")
    before = copy.deepcopy(model.state_dict())
    tune(model, IMAGES, teacher(IMAGES).detach(), 10, Journal())
    for name, value in model.state_dict().items():
        learned = name.endswith(("bias", "output_quantizer.log_scale"))  # the latter always are
        assert torch.equal(value, before[name]) == (not learned), name


def test_flags_and_modules_are_restored_also_after_a_failure() -> None:
    teacher, model = converted(2)
    model.stem.weight.requires_grad_(False)
    model.train()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = [type(module) for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        tune(model, IMAGES, torch.zeros(len(IMAGES), 7), 10, Journal())
    kept = [name for name in before if not name.endswith("weight")]  # those are levels now
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in kept)
    tune(model, IMAGES, teacher(IMAGES).detach(), 2, Journal())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [type(module) for module in model.modules()] == modules
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class Twins(nn.Module):
    """Two convolutions that share weight and bias, behind each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.stem, self.first, self.second):
            x = torch.relu(conv(x))
        return x.mean((2, 3))


def test_layers_that_share_a_weight_keep_their_scales() -> None:
    teacher, model = calibrated(Twins(), 2)
    assert model.first.weight is model.second.weight
    latent = model.first.weight.detach().clone()
    scales = model.first.weight_quantizer.scale
    tune(model, IMAGES, teacher(IMAGES).detach(), 5, Journal())
    assert torch.equal(model.first.weight, latent)
    assert torch.equal(model.first.weight_quantizer.scale, scales)
    assert not torch.equal(model.first.bias, teacher.first.bias)


@pytest.mark.parametrize("unit", [100.0, 0.01])
def test_the_units_between_layers_do_not_matter(unit: float) -> None:
    found = {}
    for factor in (1.0, unit):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(
                *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()),
                *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
            )
        with torch.no_grad():  # the same function
            for parameter in (net[0].weight, net[0].bias, net[2].bias):
                parameter.mul_(factor)
            net[6].weight.div_(factor)
        teacher, model = calibrated(net, 2)
        before = distance(model, teacher, OTHERS)
        tune(model, IMAGES, teacher(IMAGES).detach(), 50, Journal())
        found[factor] = distance(model, teacher, OTHERS) / before
    assert found[1.0] < 0.7
    assert found[unit] == pytest.approx(found[1.0], rel=0.1)


def test_what_comes_no_nearer_stays() -> None:
    _, model = converted(2)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        tune(model, IMAGES, model(IMAGES), 5, Journal())  # nothing is nearer
    scales = [name for name in before if name.endswith(("log_scale", "bias"))]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in scales)


def test_without_anything_to_learn_nothing_happens() -> None:
    net = nn.Sequential(nn.Flatten(), *(nn.Linear(192, 192, bias=False) for _ in range(3)))
    teacher, model = calibrated(net, 2, 32, "fixed")
    before = copy.deepcopy(model.state_dict())
    tune(model, IMAGES, teacher(IMAGES).detach(), 5, Journal())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("bits", "act_bits", "tuned"),
    [(8, 8, 0), (4, 4, 0), (3, 8, 0), (2, 8, 1), (4, 2, 1), (1, 8, 1)],
)
def test_layers_are_tuned_where_few_bits_are_left(
    bits: int, act_bits: int, tuned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(reconstruction, "tune", lambda *_: called.append(1))
    _, model = converted(bits, act_bits)
    reconstruct(model, [IMAGES], 2, Journal())
    assert len(called) == tuned
