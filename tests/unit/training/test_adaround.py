"""Rounding learned layer by layer, and biases put right: what changes, and what must not."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import StdConv2d
from torch import Tensor, nn

from ricciq.convert.rewrite import convert, quantize, quantized_layers
from ricciq.errors import InputError, RicciqError
from ricciq.evaluation import evaluate
from ricciq.layers.base import QuantLayer
from ricciq.quant.calibration import calibrate
from ricciq.recipe import Recipe
from ricciq.runs.folder import RunFolder
from ricciq.system.journal import Journal
from ricciq.training import reconstruction
from ricciq.training.reconstruction import reconstruct
from ricciq.workflows import train as training
from ricciq.workflows.job import Job, prepare
from ricciq.workflows.session import Session

CPU = torch.device("cpu")
RECIPE = Recipe().override(
    {
        "model.name": "digits_resnet8",
        "data.name": "digits",
        "quantization.weight_bits": 2,
        "quantization.act_bits": 4,
        "quantization.reconstruction": 50,
        "training.epochs": 0,
        "device": "cpu",
    }
)
STEPS = 50


@pytest.fixture(scope="module", autouse=True)
def layer_by_layer() -> Iterator[None]:
    """What follows, which all layers have a part in, has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "tune", lambda *_: None)
        yield


@dataclass
class Learned:
    """A network before and after its rounding was learned.

    Attributes:
        teacher: the float network.
        nearest: converted and calibrated.
        model: the same with its rounding learned.
        norms: which BatchNorm each layer took in, by the layer's name, in the order they run.
        batches: what was shown.
    """

    teacher: nn.Module
    nearest: nn.Module
    model: nn.Module
    norms: dict[str, str | None]
    batches: list[Tensor]

    def layers(self) -> list[tuple[str, QuantLayer, QuantLayer]]:
        """Name, rounded to nearest, and learned."""
        before, after = quantized_layers(self.nearest), quantized_layers(self.model)
        return [(name, before[name], after[name]) for name in self.norms]


def learn(changes: dict[str, Any] | None = None, steps: int = STEPS) -> Learned:
    """Learn the rounding of the digits net."""
    recipe = RECIPE.override(changes or {})
    job = prepare(recipe, Session(CPU))
    teacher = copy.deepcopy(job.model).eval().requires_grad_(False)
    batches = [images for images, _ in job.loader("fit", samples=192)]
    model = convert(job.model, job.plan, recipe.quantization.config)
    calibrate(model, batches)
    nearest = copy.deepcopy(model)
    norms = {layer.name: layer.norm for layer in job.plan.layers}
    reconstruct(model, batches, steps, Journal())
    return Learned(teacher, nearest, model, norms, batches)


@pytest.fixture(scope="module", params=[2, 3], ids=["W2", "W3"])
def learned(request: pytest.FixtureRequest) -> Learned:
    return learn({"quantization.weight_bits": request.param})


def codes(layer: QuantLayer) -> Tensor:
    return layer.weight_quantizer.codes(layer.latent)


def is_learned(layer: QuantLayer) -> bool:
    return layer.weight_quantizer.bits != 8


@torch.no_grad()
def seen_at(model: nn.Module, names: Sequence[str], batches: list[Tensor]) -> dict[str, Any]:
    """The input and the output of modules, over all pictures."""
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            seen[name] = args[0].clone(), output.clone()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    model.eval()(torch.cat(batches))
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def errors(found: Learned, model: nn.Module) -> dict[str, Tensor]:
    """How each layer of a model answers beside the float layer, given what the learned one is."""
    ends = {name: norm or name for name, norm in found.norms.items()}
    wanted = seen_at(found.teacher, list(ends.values()), found.batches)
    given = seen_at(found.model, list(ends), found.batches)
    layers = quantized_layers(model.eval())
    return {name: layers[name](given[name][0]) - wanted[end][1] for name, end in ends.items()}


def channel_means(error: Tensor) -> Tensor:
    return error.transpose(0, 1).flatten(1).mean(1)


def spread(error: Tensor) -> float:
    """The mean square of what is left of an error without the means of its channels."""
    return float(error.transpose(0, 1).flatten(1).var(1, correction=0).mean())


def same_state(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# What is learned


def test_every_latent_weight_becomes_one_of_the_two_levels_beside_it(learned: Learned) -> None:
    for name, before, after in learned.layers():
        quantizer = after.weight_quantizer
        assert torch.equal(quantizer.log_scale, before.weight_quantizer.log_scale)
        if not is_learned(after):
            continue
        ratio = before.weight_quantizer.ratio(before.latent.detach())
        down, up = (
            place.clamp(quantizer.grid.low, quantizer.grid.high)
            for place in (ratio.floor(), ratio.floor() + 1)
        )
        chosen = codes(after).float()
        assert ((chosen == down) | (chosen == up)).all(), name
        scale = quantizer.scale.view(-1, 1, 1, 1)
        assert torch.equal(after.latent, chosen * scale), name
        assert torch.equal(quantizer(after.latent), after.latent), name
        # Some go the farther way, or nothing would be learned; most do not.
        assert 0.01 < (codes(after) != codes(before)).float().mean() < 0.3, name


def test_every_layer_answers_nearer_to_the_float_layer(learned: Learned) -> None:
    before, after = errors(learned, learned.nearest), errors(learned, learned.model)
    for name, _, layer in learned.layers():
        assert after[name].square().mean() < before[name].square().mean(), name
        if is_learned(layer):  # and not by its bias alone
            assert spread(after[name]) < 0.999 * spread(before[name]), name


def test_no_channel_is_off_on_average(learned: Learned) -> None:
    before, after = errors(learned, learned.nearest), errors(learned, learned.model)
    for name, error in after.items():
        # Fitted with the BatchNorm folded in, compared without: codes may differ at ties.
        assert channel_means(error).abs().max() < 1e-4, name
        assert channel_means(before[name]).abs().max() > 1e-4, name


def test_what_takes_no_part_stays_as_it_was(learned: Learned) -> None:
    before, after = learned.nearest.state_dict(), learned.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {"fc.bias"}
    # Ranges are found again, from what quantized layers in front give.
    ends = ("_quantizer.log_scale", "_quantizer.zero_point")
    expected |= {name for name in changed if name.endswith(ends) and "weight_" not in name}
    for name, _, layer in learned.layers():
        expected |= {f"{name}.norm.bias"} if learned.norms[name] else set()
        expected |= {f"{name}.weight"} if is_learned(layer) else set()
    assert changed == expected


@pytest.mark.slow
def test_more_steps_come_nearer() -> None:
    last = []
    for steps in (5, STEPS):
        found = learn(steps=steps)
        last.append(float(errors(found, found.model)["fc"].square().mean()))  # of all layers
    assert last[1] < 0.9 * last[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization.weight_bits": 8},
        {"quantization.weight_bits": 1},
        {"quantization.weight_quantizer": "odd"},
        {"quantization.weight_quantizer": "dorefa"},
        {"quantization.weight_quantizer": "codebook"},
        {"quantization.weight_norm": True},
    ],
    ids=lambda changes: " ".join(str(value) for value in changes.values()),
)
def test_other_weights_stay_and_their_biases_are_put_right(changes: dict[str, Any]) -> None:
    found = learn(changes)
    for name, before, after in found.layers():
        assert torch.equal(codes(before), codes(after)), name
        assert torch.equal(before.latent, after.latent), name
    for name, error in errors(found, found.model).items():
        assert channel_means(error).abs().max() < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"quantization.weight_bits": "ternary"},
        {"quantization.weight_quantizer": "fixed"},
        {"quantization.edge_bits": 4},
        {"quantization.act_bits": 32},
    ],
    ids=lambda changes: " ".join(str(value) for value in changes.values()),
)
def test_all_that_lies_on_a_plain_grid_is_learned(changes: dict[str, Any]) -> None:
    found = learn(changes)
    before, after = errors(found, found.nearest), errors(found, found.model)
    for name, _, layer in found.layers():
        if is_learned(layer):
            assert spread(after[name]) < 0.999 * spread(before[name]), name
        assert channel_means(after[name]).abs().max() < 1e-4, name
    assert sum(is_learned(layer) for _, _, layer in found.layers()) == (
        10 if "quantization.edge_bits" in changes else 8
    )


# Other layers than those of the digits net


class Mixed(nn.Module):
    """Convolutions with a BatchNorm, with a bias, with neither, standardized; tokens at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.standardized = StdConv2d(8, 8, 3, padding=1, bias=True)
        self.biased = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.bare = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.tokens = nn.Linear(8, 12)
        self.bare_tokens = nn.Linear(12, 12, bias=False)
        self.head = nn.Linear(12, 5)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        for conv in (self.standardized, self.biased, self.bare):
            x = torch.relu(conv(x))
        x = x.flatten(2).transpose(1, 2)
        x = torch.relu(self.bare_tokens(torch.relu(self.tokens(x))))
        return self.head(x.mean(1))


@pytest.fixture
def mixed() -> Learned:
    """A network of every kind of layer, with its rounding learned."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = Mixed().eval().requires_grad_(False)
        nn.init.normal_(teacher.norm.weight)
        nn.init.normal_(teacher.norm.bias)
    chance = torch.Generator().manual_seed(1)
    batches = [torch.randn(24, 3, 10, 10, generator=chance) for _ in range(4)]
    model = copy.deepcopy(teacher)
    plan = quantize(model, batches[0][:1], 3, 8)
    calibrate(model, batches)
    nearest = copy.deepcopy(model)
    norms = {layer.name: layer.norm for layer in plan.layers}
    reconstruct(model, batches, STEPS, Journal())
    return Learned(teacher, nearest, model, norms, batches)


def test_a_layer_without_a_bias_is_left_without_one(mixed: Learned) -> None:
    without = ("bare", "bare_tokens")
    for name, before, after in mixed.layers():
        assert (after.bias is None) == (before.bias is None) == (name in (*without, "stem"))
    after = errors(mixed, mixed.model)
    for name, error in after.items():
        channels = error.transpose(1, 2) if "tokens" in name else error
        off = channel_means(channels).abs().max()
        if name in without:
            assert off > 1e-4, name
        else:
            assert off < 1e-5, name


def test_standardized_weights_keep_their_codes_and_the_others_learn(mixed: Learned) -> None:
    changed = {
        name
        for name, before, after in mixed.layers()
        if not torch.equal(codes(before), codes(after))
    }
    assert changed == {"biased", "bare", "tokens", "bare_tokens"}
    before, after = errors(mixed, mixed.nearest), errors(mixed, mixed.model)
    for name in changed:
        assert after[name].square().mean() < before[name].square().mean(), name


# What must stay


def test_modes_and_what_is_trained_are_as_before() -> None:
    recipe = RECIPE
    job = prepare(recipe, Session(CPU))
    teacher = copy.deepcopy(job.model).train()
    model = convert(job.model, job.plan, recipe.quantization.config).train()
    batches = [images for images, _ in job.loader("fit", samples=64)]
    calibrate(model, batches)
    model.get_submodule("layer2").eval()
    frozen = quantized_layers(model)["layer1.0.conv1"]
    frozen.weight.requires_grad_(False)
    frozen.weight_quantizer.log_scale.requires_grad_(False)
    taught = copy.deepcopy(teacher)
    modes = [module.training for module in model.modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    names = [type(module) for module in model.modules()]
    reconstruct(model, batches, 5, Journal())
    assert [module.training for module in model.modules()] == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert set(flags.values()) == {True, False}
    assert [type(module) for module in model.modules()] == names
    assert all(p.grad is None for p in [*model.parameters(), *teacher.parameters()])
    assert all(not module._forward_pre_hooks for module in [*model.modules(), *teacher.modules()])
    assert same_state(teacher, taught)
    assert all(module.training for module in teacher.modules())


@pytest.mark.slow
def test_the_same_pictures_give_the_same_bits() -> None:
    models = []
    for seed in (0, 1):  # of what else is random
        torch.manual_seed(seed)
        models.append(learn(steps=10).model)
    assert same_state(*models)


# Images that say little


def small() -> nn.Sequential:
    """A network whose second layer can be made to give the same for any image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(128, 5)),
        ).eval()


IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "images", [IMAGES[:1], IMAGES[:17], torch.full((20, 3, 8, 8), 0.7), torch.zeros(20, 3, 8, 8)]
)
@pytest.mark.parametrize("varies", [True, False])
def test_few_images_or_of_one_colour_or_a_constant_layer_do(
    images: Tensor, bits: int, varies: bool
) -> None:
    teacher = small()
    if not varies:
        nn.init.zeros_(teacher[2].weight)
    model = copy.deepcopy(teacher)
    quantize(model, images[:1], bits, bits)
    reconstruct(model, [images], 5, Journal())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    near = (model(images) - teacher(images)).square().mean()
    assert near <= teacher(images).square().mean()


def test_a_layer_whose_output_is_not_finite_is_named() -> None:
    model = small()
    quantize(model, IMAGES[:1], 4, 8)
    with torch.no_grad():
        model[2].bias.fill_(float("nan"))
    with pytest.raises(
        InputError, match=r"^the float model gives NaN or infinite activations at 2 "
    ):
        reconstruct(model, [IMAGES], 5, Journal())


# Memory


class Hungry(nn.Module):
    """Finds no memory from its so many-th call on, as torch says it."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
        return x


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        (4 + 3, "64 images at a layer, but for 48; set quantization.reconstruction_images to 48"),
        (2, "64 images at a layer; set quantization.reconstruction_images to 32"),
        (4 + 0, "64 images at a layer; set quantization.reconstruction_images to 32"),
    ],
)
def test_where_memory_runs_out_it_says_how_many_images_fitted(calls: int, words: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    images = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    quantize(model, images[:1], 4, 8)
    model.insert(1, Hungry(calls))  # four times for the float network
    with pytest.raises(RicciqError, match=f"^there is not enough memory for {words}$"):
        reconstruct(model, [images], 5, Journal())


def test_wide_depthwise_layers_keep_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(_: QuantLayer, rows: Tensor, *others: Any) -> None:  # noqa: ARG001
        seen.append(tuple(rows.shape))

    monkeypatch.setattr(reconstruction, "learn_rounding", note)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 5, groups=8), nn.Conv2d(8, 4, 1))
    images = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    quantize(model.eval(), images[:1], 4, 8)
    monkeypatch.setattr(reconstruction, "NUMBERS", 32 * 4 * 8 * 25)
    reconstruct(model, [images], 5, Journal())
    assert seen == [(32 * 4, 8, 25)]
    monkeypatch.undo()


# Runs


def trained(path: Path, job: Job) -> nn.Module:
    path.mkdir()
    session = Session(CPU, folder=RunFolder(path))
    return training.train(job, session).model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("act_bits", [2, 4])
def test_two_bits_without_training_lose_little(tmp_path: Path, act_bits: int) -> None:
    found = {}
    for steps in (0, 50):
        changes = {"quantization.reconstruction": steps, "quantization.act_bits": act_bits}
        job = prepare(RECIPE.override(changes), Session(CPU))
        model = trained(tmp_path / str(steps), job)
        found[steps] = evaluate({"model": model}, job.loader("val"))["model"].top1
    assert found[50] > 85
    assert found[50] > found[0] + 30


def test_training_starts_from_the_nearest_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "reconstruct", None)
    changes = {"training.epochs": 1, "data.train_samples": 64}
    trained(tmp_path / "run", prepare(RECIPE.override(changes), Session(CPU)))


@pytest.mark.slow
def test_labels_are_not_asked(tmp_path: Path) -> None:
    # Few pictures are chosen so that each class is among them: all leave nothing to choose.
    changes = {
        "data.calibration_batches": 30,
        "quantization.reconstruction": 5,
        "quantization.reconstruction_images": 10_000,
    }
    models = []
    for name in ("right", "wrong"):
        job = prepare(RECIPE.override(changes), Session(CPU))
        if name == "wrong":
            targets = job.data._train.targets
            targets[:] = np.random.default_rng(0).permutation(targets)
        models.append(trained(tmp_path / name, job))
    assert same_state(*models)


def test_few_pictures_are_of_every_class_alike(tmp_path):
    """A folder is read class by class, so the first of its pictures are of one class."""
    for part, count in (("train", 30), ("val", 2)):
        for grey, name in ((0, "black"), (255, "white")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("L", (8, 8), grey).save(folder / f"{number}.png")
    changes = {"data.name": str(tmp_path), "data.batch_size": 10, "data.calibration_batches": 4}
    job = prepare(RECIPE.override({**changes, "model.pretrained": False}), Session(CPU))
    for most, parts, wanted in ((20, 1, 20), (None, 1, 40), (500, 1, 40), (20, 3, 20)):
        images = torch.cat(list(job.calibration_images(parts, most)))
        assert len(images) == wanted
        assert (images[:, 0, 0, 0] > 0).float().mean() == 0.5
    assert sum(map(len, job.calibration_images(2))) == len(job.loader("fit").dataset) < 80
