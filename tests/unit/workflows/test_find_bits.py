"""Automatic bits: sensitivities, the allocation of a budget, and runs."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command import Answer, ricciq
from torch import Tensor, nn

from ricciq.cli import request
from ricciq.convert.allocation import Overhead, allocate, average_bits
from ricciq.convert.sensitivity import WIDTHS, Sensitivity, measure_sensitivity
from ricciq.deploy.inspection import inspect_onnx
from ricciq.errors import RecipeError, UsageError
from ricciq.quant.config import QuantizerConfig
from ricciq.recipe import Recipe
from ricciq.runs.folder import RunFolder
from ricciq.system.journal import Journal
from ricciq.system.tables import read_csv
from ricciq.workflows import find_bits as autobits
from ricciq.workflows import quantize as pipeline
from ricciq.workflows.find_bits import choose_bits, find_budget
from ricciq.workflows.job import Job, prepare
from ricciq.workflows.session import Session

QUANTIZE = ["quantize", "digits_resnet8", "--data", "digits"]
RECIPE = Recipe().override(
    {
        "model.name": "digits_resnet8",
        "data.name": "digits",
        "data.calibration_batches": 2,
        "quantization.weight_bits": "auto",
        "quantization.average_bits": 2.5,
        "device": "cpu",
    }
)
SESSION = Session(torch.device("cpu"))
NOTHING = Overhead({}, {})


def check_refusal(answer: Answer, *words: str) -> None:
    """Wrong usage: one sentence with these words, and nothing else."""
    last = answer.err.strip().splitlines()[-1]
    assert answer.code == 2, last
    assert answer.out == ""
    assert last.startswith("ricciq: ")
    assert "Traceback" not in answer.err
    for word in words:
        assert word in last


def job_of(changes: Mapping[str, Any] | None = None) -> Job:
    recipe = RECIPE.replace(changes or {}, "the test")
    return prepare(recipe, SESSION)


# The allocation


def cost_and_size(
    layers: Sequence[Sensitivity], chosen: Mapping[str, int], overhead: Overhead
) -> tuple[float, float]:
    lost = sum(layer.divergence[chosen[layer.name]] for layer in layers)
    size = sum(
        layer.parameters * chosen[layer.name] + overhead.each.get(chosen[layer.name], 0)
        for layer in layers
    )
    return lost, size + sum(overhead.once.get(bits, 0) for bits in set(chosen.values()))


def by_trying(
    layers: Sequence[Sensitivity], budget: float, overhead: Overhead
) -> tuple[float, float] | None:
    """The least loss, and the least size with that loss, by trying all widths."""
    names = [layer.name for layer in layers]
    tried = [
        cost_and_size(layers, dict(zip(names, bits, strict=True)), overhead)
        for bits in itertools.product(layers[0].divergence, repeat=len(layers))
    ]
    return min((found for found in tried if found[1] <= budget), default=None)


def instance(
    rng: random.Random, losses: Sequence[float], most: int
) -> tuple[list[Sensitivity], Overhead]:
    """Four layers with four widths, and whole numbers of bits beside them."""
    widths = sorted(rng.sample(WIDTHS, 4))
    layers = [
        Sensitivity(
            f"layer{n}",
            rng.randint(1, most),
            dict(zip(widths, sorted(rng.choices(losses, k=4), reverse=True), strict=True)),
        )
        for n in range(4)
    ]
    each = {bits: rng.randint(0, most // 5) for bits in widths}
    once = {bits: rng.randint(0, 2 * most) for bits in widths}
    return layers, rng.choice(
        [NOTHING, Overhead(each, {}), Overhead({}, once), Overhead(each, once)]
    )


def budget_for(rng: random.Random, layers: Sequence[Sensitivity]) -> float:
    """From too little to more than enough."""
    weights = sum(layer.parameters for layer in layers)
    return rng.uniform(0.9 * min(WIDTHS), 1.2 * max(WIDTHS)) * weights


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e-6])  # nats: at 6 bits there is little to lose
def test_no_other_widths_within_the_budget_lose_less(unit: float) -> None:
    rng = random.Random(0)
    solved = 0
    for _ in range(60):
        layers, overhead = instance(rng, [unit * rng.random() for _ in range(50)], most=5000)
        budget = budget_for(rng, layers)
        best = by_trying(layers, budget, overhead)
        if best is None:
            with pytest.raises(UsageError):
                allocate(layers, budget, overhead)
            continue
        lost, size = cost_and_size(layers, allocate(layers, budget, overhead), overhead)
        assert size <= budget
        assert lost == pytest.approx(best[0], rel=1e-9, abs=0)
        solved += 1
    assert 20 < solved < 60


def test_of_widths_that_lose_alike_the_smallest_are_taken() -> None:
    rng = random.Random(1)
    eighths = [n / 8 for n in range(4)]  # which add up without an error
    for _ in range(60):
        layers, overhead = instance(rng, eighths, most=5000)
        budget = budget_for(rng, layers)
        best = by_trying(layers, budget, overhead)
        if best is not None:
            assert cost_and_size(layers, allocate(layers, budget, overhead), overhead) == best


def test_a_layer_that_loses_nothing_gets_the_fewest_bits() -> None:
    falling = Sensitivity("falling", 1000, {bits: 2.0**-bits for bits in WIDTHS})
    for lost in (0.0, 0.125):
        flat = Sensitivity("flat", 1000, dict.fromkeys(WIDTHS, lost))
        assert allocate([flat], 1e6) == {"flat": 1}
        assert allocate([flat, falling], 1e6) == {"flat": 1, "falling": 8}


def test_a_table_that_two_layers_share_is_paid_for_once() -> None:
    layers = [
        Sensitivity("first", 100, {2: 4.0, 3: 1.0}),
        Sensitivity("second", 100, {2: 4.0, 3: 1.0}),
    ]
    tables = Overhead({}, {2: 150, 3: 150})
    assert allocate(layers, 750, tables) == {"first": 3, "second": 3}  # 600 and one table
    assert allocate(layers, 749, tables) == {"first": 2, "second": 2}  # 500 and two are too many
    for_each = Overhead({2: 75, 3: 75}, {})
    assert allocate(layers, 750, for_each) == {"first": 3, "second": 3}
    assert sorted(allocate(layers, 749, for_each).values()) == [2, 3]


def test_a_budget_below_the_least_is_refused_and_the_least_itself_is_not() -> None:
    layers = [Sensitivity(f"layer{n}", 80, {1: 0.5, 2: 0.25}) for n in range(3)]
    assert allocate(layers, 240) == {f"layer{n}": 1 for n in range(3)}
    assert allocate(layers, 290, Overhead({1: 10}, {1: 20})) == {f"layer{n}": 1 for n in range(3)}
    for budget, overhead in ((239, None), (289, Overhead({1: 10}, {1: 20})), (0, None), (-8, None)):
        with pytest.raises(UsageError) as error:
            allocate(layers, budget, overhead)
        assert f"{budget / 8:.0f} bytes are too few" in str(error.value)
        assert "with 1 bit each; give a larger budget" in str(error.value)


def by_table(layers: Sequence[Sensitivity], budget: int) -> float:
    """The least loss, by the dynamic program that has an entry for every size there is."""
    least = [0.0] * (budget + 1)
    for layer in layers:
        costs = [(layer.parameters * bits, lost) for bits, lost in layer.divergence.items()]
        least = [
            min(
                (least[room - size] + lost for size, lost in costs if size <= room),
                default=math.inf,
            )
            for room in range(budget + 1)
        ]
    return least[budget]


def test_many_layers_lose_no_more_than_a_table_of_all_sizes_says() -> None:
    rng = random.Random(2)
    for _ in range(10):
        layers = [
            Sensitivity(
                f"layer{n}",
                rng.randint(1, 12),
                dict(
                    zip(WIDTHS, sorted((rng.random() for _ in WIDTHS), reverse=True), strict=True)
                ),
            )
            for n in range(25)
        ]
        budget = int(rng.uniform(1.1, 6.0) * sum(layer.parameters for layer in layers))
        lost, size = cost_and_size(layers, allocate(layers, budget), NOTHING)
        assert size <= budget
        assert lost == pytest.approx(by_table(layers, budget), rel=1e-9)


def test_two_hundred_layers_of_any_sizes_spend_the_budget() -> None:
    rng = random.Random(14)
    layers = []
    for n in range(200):
        lost = sorted((rng.random() ** 6 * 10 ** rng.uniform(-4, 0) for _ in WIDTHS), reverse=True)
        divergence = dict(zip(WIDTHS, lost, strict=True))
        layers.append(Sensitivity(f"layer{n}", rng.randint(100, 3_000_000), divergence))
    budget = 2.5 * sum(layer.parameters for layer in layers)
    _, size = cost_and_size(layers, allocate(layers, budget), NOTHING)
    assert 0.999 * budget < size <= budget


def test_the_average_counts_weights() -> None:
    layers = [Sensitivity("small", 100, {}), Sensitivity("large", 300, {})]
    assert average_bits(layers, {"small": 8, "large": 2}) == 3.5


# What the widths of a layer lose


MEASURED = ("layer2.0.conv2", "layer3.0.conv1")  # the first has negative BatchNorm weights


@pytest.fixture(scope="module")
def job() -> Job:
    return job_of()


@pytest.fixture(scope="module")
def batches(job: Job) -> list[Tensor]:
    return [images for images, _ in job.loader("fit", samples=128)]


@pytest.fixture(scope="module")
def measured(job: Job, batches: list[Tensor]) -> list[Sensitivity]:
    names = [layer.name for layer in job.plan.layers[1:-1]]
    return measure_sensitivity(
        job.model, job.plan, names, job.recipe.quantization.config, batches, Journal()
    )


@torch.no_grad()
def by_hand(job: Job, name: str, bits: int, kind: str, batches: list[Tensor]) -> float:
    """The mean divergence of the predictions if only the weight of one layer is rounded."""
    plain, rounded = copy.deepcopy(job.model).eval(), copy.deepcopy(job.model).eval()
    norm = next(layer.norm for layer in job.plan.layers if layer.name == name)
    assert norm is not None
    # Conversion turns rows around whose BatchNorm weight is negative, before they are rounded.
    sign = torch.where(rounded.get_submodule(norm).weight < 0, -1.0, 1.0).view(-1, 1, 1, 1)
    weight = rounded.get_submodule(name).weight
    quantizer = QuantizerConfig(kind).quantizer_for(weight * sign, bits)
    weight.copy_(quantizer(weight * sign) * sign)
    lost = 0.0
    for images in batches:
        p, q = plain(images).double().softmax(1), rounded(images).double().softmax(1)
        lost += float((p * (p.log() - q.log())).sum())
    return lost / sum(map(len, batches))


@pytest.mark.slow
def test_every_layer_but_the_first_and_the_last_is_measured_at_every_width(
    job: Job, measured: list[Sensitivity]
) -> None:
    assert [layer.name for layer in measured] == [layer.name for layer in job.plan.layers[1:-1]]
    for layer in measured:
        assert layer.parameters == job.model.get_submodule(layer.name).weight.numel()
        assert list(layer.divergence) == list(WIDTHS)


@pytest.mark.slow
def test_more_bits_never_lose_more_and_eight_lose_next_to_nothing(
    measured: list[Sensitivity],
) -> None:
    for layer in measured:
        lost = list(layer.divergence.values())
        assert lost == sorted(lost, reverse=True)
        assert lost[0] > 1e-4
        assert abs(lost[-1]) < 1e-5


def check_against_hand(job: Job, found: Sensitivity, kind: str, batches: list[Tensor]) -> None:
    least = float("inf")
    for bits, lost in found.divergence.items():
        least = min(least, by_hand(job, found.name, bits, kind, batches))
        assert lost == pytest.approx(least, rel=0.01, abs=1e-7), (found.name, bits)


@pytest.mark.slow
def test_what_is_measured_is_what_rounding_that_layer_alone_loses(
    job: Job, measured: list[Sensitivity], batches: list[Tensor]
) -> None:
    for layer in measured:
        if layer.name in MEASURED:
            check_against_hand(job, layer, "lsq", batches)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["odd", "dorefa", "codebook"])
def test_other_quantizers_are_measured_as_they_round(
    job: Job, batches: list[Tensor], kind: str
) -> None:
    config = replace(job.recipe.quantization.config, weights=kind)
    found = measure_sensitivity(job.model, job.plan, MEASURED, config, batches, Journal())
    for layer in found:
        assert list(layer.divergence) == ([1, 2, 4, 8] if kind == "codebook" else list(WIDTHS))
        check_against_hand(job, layer, kind, batches)


@pytest.mark.slow
def test_measuring_leaves_the_float_model_as_it_is(batches: list[Tensor]) -> None:
    job = job_of()
    job.model.train()
    job.model.get_submodule("layer2").eval()
    frozen = next(job.model.parameters()).requires_grad_(False)
    before = copy.deepcopy(job.model)
    config = job.recipe.quantization.config
    first = measure_sensitivity(job.model, job.plan, MEASURED[:1], config, batches, Journal())
    again = measure_sensitivity(job.model, job.plan, MEASURED[:1], config, batches, Journal())
    assert first == again
    assert str(job.model) == str(before)
    state = job.model.state_dict()
    assert state.keys() == before.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in before.state_dict().items())
    assert [m.training for m in job.model.modules()] == [m.training for m in before.modules()]
    assert not frozen.requires_grad
    assert all(p.grad is None for p in job.model.parameters())


# The plan


def widths_of(job: Job) -> list[int | str]:
    return [layer.weight_bits for layer in job.plan.layers]


def test_a_recipe_with_a_width_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autobits, "find_sensitivity", None)
    job = job_of({"quantization.weight_bits": 3, "quantization.average_bits": None})
    assert find_budget(job, SESSION) is None
    assert choose_bits(job, None, SESSION) is job


@pytest.mark.slow
def test_only_the_widths_of_weights_between_the_ends_are_replaced(job: Job) -> None:
    chosen = choose_bits(job, find_budget(job, SESSION), SESSION)
    assert widths_of(job) == [8] * 10
    assert widths_of(chosen)[:: len(job.plan.layers) - 1] == [8, 8]
    assert len(set(widths_of(chosen)[1:-1])) > 1
    alike = [replace(layer, weight_bits=8) for layer in chosen.plan.layers]
    assert replace(chosen.plan, layers=alike) == job.plan
    assert chosen._replace(plan=job.plan) == job


@pytest.mark.slow
def test_a_codebook_gets_widths_that_it_has() -> None:
    job = job_of({"quantization.weight_quantizer": "codebook"})
    found = choose_bits(job, find_budget(job, SESSION), SESSION)
    assert set(widths_of(found)) <= {1, 2, 4, 8}
    assert len(set(widths_of(found)[1:-1])) > 1


def test_a_network_of_two_layers_has_nothing_to_find_bits_for(job: Job) -> None:
    short = job._replace(plan=replace(job.plan, layers=job.plan.layers[:2]))
    with pytest.raises(UsageError, match=r"digits_resnet8 has no layer .* give --bits a number"):
        find_budget(short, SESSION)


@pytest.mark.slow
def test_a_dry_run_shows_the_bits_that_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = ricciq(*QUANTIZE, "--bits", "auto:2.5", "--dry-run", "--json")
    assert answer.code == 0, answer.err
    assert "--bits auto:2.5 sets the weights; activations get 3 bits" in answer.err
    assert "bits by layer" in answer.err
    plan = json.loads(answer.out)
    wanted = plan["recipe"]["quantization"]
    assert (wanted["weight_bits"], wanted["average_bits"]) == ("auto", 2.5)
    assert wanted["act_bits"] == 3
    first, *inner, last = plan["layers"]
    assert first["weight_bits"] == last["weight_bits"] == 8
    assert {layer["act_bits"] for layer in inner} == {3}
    weights = sum(layer["parameters"] for layer in inner)
    bits = sum(layer["parameters"] * layer["weight_bits"] for layer in inner)
    assert 2.3 < bits / weights <= 2.5
    assert len({layer["weight_bits"] for layer in inner}) > 2
    assert list(tmp_path.iterdir()) == []


# Recipes and flags


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"weight_bits": "auto"}, ["auto", "budget", "average_bits", "max_bytes"]),
        ({"weight_bits": 2, "average_bits": 2.5}, ["auto", "budget"]),
        ({"average_bits": 2.5}, ["auto", "budget"]),
        ({"weight_bits": 2, "max_bytes": "4MB"}, ["auto", "budget"]),
        ({"weight_bits": "auto", "average_bits": 2.5, "max_bytes": "4MB"}, ["one budget"]),
        ({"weight_bits": "auto", "average_bits": 0.5}, ["average_bits", "0.5"]),
        ({"weight_bits": "auto", "average_bits": 8.5}, ["average_bits", "8.5"]),
        ({"weight_bits": "auto", "max_bytes": 0}, ["max_bytes"]),
        ({"weight_bits": "auto", "max_bytes": "large"}, ["max_bytes", "large"]),
    ],
)
def test_a_recipe_has_auto_and_one_budget_or_neither(
    section: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_values({"quantization": section})
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("budget", [{"average_bits": 2.5}, {"max_bytes": "4MB"}])
def test_a_budget_survives_the_file_that_a_resumed_run_is_compared_with(
    tmp_path: Path, budget: dict[str, Any]
) -> None:
    recipe = Recipe.from_values({"quantization": {"weight_bits": "auto", **budget}})
    assert recipe.quantization.max_bytes in (None, 4_000_000)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-bytes", "4MB", "--bits", "2"], ["--max-bytes 4MB", "leave out"]),
        (["--max-bytes", "4MB", "--weight-bits", "2"], ["--max-bytes 4MB", "leave out"]),
        (["--max-bytes", "4MB", "--bits", "auto:2"], ["--max-bytes 4MB", "leave out"]),
        (["--max-bytes", "x"], ["max_bytes", "x"]),
        (["--max-bytes", "0"], ["max_bytes", "0"]),
        (["--bits", "auto"], ["--bits auto", "auto:2.5"]),
        (["--bits", "auto:"], ["--bits auto:", "auto:2.5"]),
        (["--bits", "auto:x"], ["--bits auto:x", "auto:2.5"]),
        (["--bits", "auto:0.5"], ["--bits auto:0.5", "auto:2.5"]),
        (["--bits", "auto:9"], ["9"]),
        (["--bits", "auto:-1"], ["-1"]),
        (["--bits", "auto:nan"], ["nan"]),
        (["--bits", "auto:inf"], ["inf"]),
        (["--weight-bits", "auto:nan"], ["nan"]),
        (["--weight-bits", "auto:0", "--bits", "4"], ["0"]),
        (["--act-bits", "auto:2.5"], ["--act-bits auto:2.5", "1 to 8"]),
    ],
    ids=" ".join,
)
def test_flags_that_ask_for_no_budget_are_refused(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], words: list[str]
) -> None:
    def go_on(*_: Any, **__: Any) -> None:
        raise AssertionError("the flags were taken")

    monkeypatch.setattr(pipeline, "run", go_on)
    check_refusal(ricciq(*QUANTIZE, *flags), *words)


def quantization(tmp_path: Path, *flags: str | None) -> dict[str, Any]:
    """What --bits, --weight-bits, --act-bits and --max-bytes make of a recipe with a budget."""
    file = tmp_path / "auto.yaml"
    file.write_text("quantization: {weight_bits: auto, average_bits: 2.5, act_bits: 5}\n")
    given = (*flags, *[None] * (4 - len(flags)))
    recipe, *_ = request.requested_recipe(
        "digits_resnet8", None, str(file), given, {"data.name": "digits"}
    )
    return recipe.quantization.model_dump(
        include={"weight_bits", "average_bits", "max_bytes", "act_bits"}
    )


def test_flags_take_the_place_of_the_budget_in_a_recipe(tmp_path: Path) -> None:
    assert quantization(tmp_path) == {
        "weight_bits": "auto", "average_bits": 2.5, "max_bytes": None, "act_bits": 5
    }  # fmt: skip
    assert quantization(tmp_path, "2") == {
        "weight_bits": 2, "average_bits": None, "max_bytes": None, "act_bits": 2
    }  # fmt: skip
    assert quantization(tmp_path, None, "ternary") == {
        "weight_bits": "ternary", "average_bits": None, "max_bytes": None, "act_bits": 5
    }  # fmt: skip
    assert quantization(tmp_path, None, None, "4") == {
        "weight_bits": "auto", "average_bits": 2.5, "max_bytes": None, "act_bits": 4
    }  # fmt: skip
    assert quantization(tmp_path, None, None, None, "44kB") == {
        "weight_bits": "auto", "average_bits": None, "max_bytes": 44_000, "act_bits": 5
    }  # fmt: skip
    assert quantization(tmp_path, "auto:3.5", None, "6") == {
        "weight_bits": "auto", "average_bits": 3.5, "max_bytes": None, "act_bits": 6
    }  # fmt: skip


def test_bits_on_top_of_a_recipe_that_finds_them_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autobits, "find_sensitivity", None)
    file = tmp_path / "auto.yaml"
    file.write_text("quantization: {weight_bits: auto, max_bytes: 44kB}\n")
    answer = ricciq(*QUANTIZE, "--recipe", file, "--bits", "2", "--dry-run", "--json")
    assert answer.code == 0, answer.err
    layers = json.loads(answer.out)["layers"]
    assert [layer["weight_bits"] for layer in layers] == [8, *[2] * 8, 8]
    assert [layer["act_bits"] for layer in layers] == [8, *[2] * 8, 8]


# Runs


def check_folder(folder: Path) -> list[int]:
    """Check the folder of a run with automatic bits; returns the bits of its layers."""
    report = json.loads((folder / "report.json").read_text())
    rows = read_csv(RunFolder(folder).sensitivity)
    bits = [int(row["bits"]) for row in rows]
    assert report["weight_bits"] == "auto"
    assert [layer["weight_bits"] for layer in report["layers"]] == [8, *bits, 8]
    assert [row["layer"] for row in rows] == [layer["name"] for layer in report["layers"]][1:-1]
    assert list(rows[0]) == ["layer", "parameters", "bits", *(f"nats_at_{b}" for b in WIDTHS)]
    assert (folder / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "bits by layer" in (folder / "log.txt").read_text()
    written = inspect_onnx(folder / "model.onnx")
    assert [layer.weight_bits for layer in written.layers] == [8, *bits, 8]
    assert written.fused_share() == 100
    assert report["onnx"]["agreement_unoptimized"] >= 99.5
    return bits


@pytest.mark.slow
def test_a_resumed_run_takes_the_bits_that_were_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "short.yaml"
    recipe.write_text("data: {calibration_batches: 2}\nquantization: {reconstruction: 0}\n")
    folder = tmp_path / "run"
    command = [*QUANTIZE, "--bits", "auto:2.5", "--recipe", recipe, "--epochs", "0"]
    command += ["--output", folder]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "export_float", stop)
        stopped = ricciq(*command)
    assert stopped.code == 130
    assert "activations get 3 bits" in stopped.err
    found = (folder / "sensitivity.csv").read_bytes()

    def measure(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(autobits, "find_sensitivity", measure)
    resumed = ricciq(*command, "--resume")
    assert resumed.code == 0, resumed.err
    assert (folder / "sensitivity.csv").read_bytes() == found
    bits = check_folder(folder)
    report = json.loads((folder / "report.json").read_text())
    assert {layer["act_bits"] for layer in report["layers"][1:-1]} == {3}
    sizes = [layer["parameters"] for layer in report["layers"][1:-1]]
    assert sum(n * b for n, b in zip(sizes, bits, strict=True)) <= 2.5 * sum(sizes)


LARGEST = 260_000
WEIGHED = 4
"""Files that are weighed before measuring: one for each number of bit planes, and the smallest."""


class Sized(NamedTuple):
    """A run with --max-bytes, and the sizes of the files that it tried."""

    folder: Path
    tried: list[int]


@pytest.fixture(scope="session")
def sized(run_once: Callable[..., Path], shared_folder: Path) -> Sized:
    recipe, sizes = shared_folder / "short.yaml", shared_folder / "sizes.json"
    recipe.write_text("data: {train_samples: 256, calibration_batches: 2}\n")
    weigh: Callable[[Job, nn.Module], int] = autobits._size
    tried: list[int] = []

    def note(job: Job, deployed: nn.Module) -> int:
        tried.append(weigh(job, deployed))
        sizes.write_text(json.dumps(tried))
        return tried[-1]

    flags = ["--max-bytes", "260kB", "--recipe", recipe, "--epochs", "1"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(autobits, "_size", note)
        folder = run_once("sized", *QUANTIZE, *flags)
    return Sized(folder, json.loads(sizes.read_text()))


@pytest.mark.slow
def test_a_file_is_no_larger_than_asked_for_and_uses_the_room(sized: Sized) -> None:
    size = (sized.folder / "model.onnx").stat().st_size
    assert 0.93 * LARGEST < size <= LARGEST
    report = json.loads((sized.folder / "report.json").read_text())
    assert report["size"]["onnx_bytes"] == size
    assert len(set(check_folder(sized.folder))) > 1
    assert Recipe.load(sized.folder / "recipe.yaml").quantization.max_bytes == LARGEST


@pytest.mark.slow
def test_what_was_weighed_beforehand_is_what_the_file_takes(sized: Sized) -> None:
    written = (sized.folder / "model.onnx").stat().st_size
    assert written <= sized.tried[-1] <= written + autobits.SPARE
    assert sized.tried[-1] <= LARGEST


@pytest.mark.slow
def test_a_choice_whose_file_is_too_large_is_made_again_with_less(
    sized: Sized, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [*sized.tried[:WEIGHED], LARGEST + 50_000, LARGEST + 1, LARGEST]
    left = iter(sizes)
    monkeypatch.setattr(autobits, "_size", lambda *_: next(left))
    changes = {"average_bits": None, "max_bytes": LARGEST}
    job = job_of({f"quantization.{key}": value for key, value in changes.items()})
    job = job._replace(recipe=job.recipe.override({"data.train_samples": 256}))
    budget = find_budget(job, SESSION)
    tried: list[Mapping[str, int]] = []
    monkeypatch.setattr(autobits, "_deployed", lambda _, choice, __: tried.append(choice))
    chosen = choose_bits(job, budget, SESSION)
    assert next(left, None) is None  # it goes on until a file is small enough, and no longer
    rows = read_csv(RunFolder(sized.folder).sensitivity)
    weights = {row["layer"]: int(row["parameters"]) for row in rows}
    first, second, third = (sum(weights[name] * b for name, b in c.items()) for c in tried)
    assert first > second >= third
    assert widths_of(chosen)[1:-1] == list(tried[-1].values())


@pytest.mark.slow
def test_where_no_choice_fits_but_the_smallest_that_is_taken(
    sized: Sized, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([*sized.tried[:WEIGHED], 10 * LARGEST])
    monkeypatch.setattr(autobits, "_size", lambda *_: next(sizes))
    job = job_of({"quantization.average_bits": None, "quantization.max_bytes": LARGEST})
    chosen = choose_bits(job, find_budget(job, SESSION), SESSION)
    assert widths_of(chosen) == [8, *[1] * 8, 8]
    assert next(sizes, None) is None


@pytest.mark.slow
def test_a_budget_between_the_smallest_file_and_one_bit_for_all_is_enough() -> None:
    """For few weights, 8 bits take fewer bytes than 1 bit, since they need no lookup table."""
    changes = {"model.name": "fashion_mobilenet", "model.pretrained": False}
    changes |= {"quantization.average_bits": None, "quantization.max_bytes": 48_650}
    budget = find_budget(job_of(changes), SESSION)  # with 1 bit for all 48,703 bytes
    assert budget is not None
    assert budget.smallest is not None
    assert set(budget.smallest.values()) == {1, 8}


@pytest.mark.slow
def test_a_file_too_small_for_any_widths_is_refused(
    sized: Sized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = iter(sized.tried)  # exporting the same again would take its time
    monkeypatch.setattr(autobits, "_size", lambda *_: next(sizes))
    recipe = tmp_path / "short.yaml"
    recipe.write_text("data: {calibration_batches: 2}\n")
    monkeypatch.setattr(autobits, "find_sensitivity", None)  # it is known before hours of it
    answer = ricciq(*QUANTIZE, "--max-bytes", "100kB", "--recipe", recipe, "--json")
    check_refusal(answer, "max_bytes 100000 is too small for digits_resnet8", "give more")
    least = int(answer.err.split("takes about ")[1].split(" bytes")[0])
    assert 100_000 < least == min(sized.tried)  # a bit each
    assert list(tmp_path.iterdir()) == [recipe]
