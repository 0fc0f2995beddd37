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
    """A float network, and its calibrated counterpart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = Net().eval()
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
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    tune(model, IMAGES, teacher(IMAGES).detach(), 2, Journal())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [type(module) for module in model.modules()] == modules
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_that_share_a_weight_keep_their_scales() -> None:
    teacher, model = converted(2)
    first = quantized_layers(model)["middle"]
    model.again = copy.deepcopy(first)
    model.again.weight = first.weight
    latent = first.weight.detach().clone()
    tune(model, IMAGES, teacher(IMAGES).detach(), 2, Journal())
    assert torch.equal(first.weight, latent)


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
