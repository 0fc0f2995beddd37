"""Hundreds of damaged files: each is refused with a sentence, in time, in little memory.

Where a turned bit leaves a file valid it is used; what may not happen is anything else.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
import torch
from command import ricciq
from hostility import SURE, Call, each, refused
from mutations import (
    BEYOND,
    HEADERS,
    MARK,
    NOTHING_OF_THE_KIND,
    TORCH,
    WEIGHTS,
    Mutation,
    flips,
    payload,
    truncations,
)
from mutations_of_data import RECIPES
from mutations_of_runs import ABOUT, REPORTS, RESULTS, STATES, TABLES, USELESS
from onnx import numpy_helper
from processes import start
from safetensors.torch import load_file

from ricciq.errors import UsageError
from ricciq.models.bundled import BUNDLED
from ricciq.system.tensor_files import load_tensors, save_tensors
from ricciq.workflows import finish
from ricciq.workflows import quantize as pipeline
from ricciq.workflows import train as training

pytestmark = [pytest.mark.hostile, pytest.mark.slow]


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    return load_file(BUNDLED / "digits_resnet8.safetensors")


@pytest.fixture
def far_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """End runs with exit code 2 once they have used their input."""

    def end(*_: object) -> None:
        raise UsageError("far enough; start again")

    monkeypatch.setattr(pipeline, "export_float", lambda *_: None)
    monkeypatch.setattr(training, "reconstruct", end)
    monkeypatch.setattr(finish, "export_and_report", end)


pytest_plugins = ["hostility"]

QUANTIZE = "quantize digits_resnet8 --data digits --recipe {quick} --epochs 0 --output {output}"
CHECKPOINT = f"{QUANTIZE} --checkpoint {{file}}"
TRAINED = {
    "eval": "eval {file} --data digits",
    "export": "export {file} --output {output}",
    "quantize": "quantize {file} --data digits --output {output}",
}


# Weights


def damaged(good: Path, name: str, mutation: Mutation) -> Path:
    """A file in the folder of the command, made from a good one."""
    path = Path.cwd() / name
    path.write_bytes(mutation(good.read_bytes()))
    return path


@each(SURE | HEADERS | WEIGHTS | BEYOND)
def test_safetensors(call: Call, mutation: Mutation) -> None:
    stored, about = load_tensors(BUNDLED / "digits_resnet8.safetensors")
    good = Path("float32.safetensors")
    save_tensors(
        good, {name: x.float() if x.is_floating_point() else x for name, x in stored.items()}, about
    )
    file = damaged(good, "x.safetensors", mutation)
    refused(call(CHECKPOINT, file), "x.safetensors")


@pytest.mark.usefixtures("far_enough")
@each(flips(16, end=0.01) | flips(6) | flips(4, bits=100))
def test_flipped_safetensors(call: Call, mutation: Mutation) -> None:
    call(CHECKPOINT, damaged(BUNDLED / "digits_resnet8.safetensors", "x.safetensors", mutation))


def saved_by_torch(weights: dict[str, torch.Tensor], name: str = "good.pth") -> Path:
    path = Path.cwd().parent / name
    torch.save(weights, path)
    return path


@each(SURE | TORCH)
def test_torch_files(
    call: Call, place: Path, weights: dict[str, torch.Tensor], mutation: Mutation
) -> None:
    refused(call(CHECKPOINT, damaged(saved_by_torch(weights), "x.pth", mutation)), "x.pth")
    assert not (place / MARK).exists()


@pytest.mark.usefixtures("far_enough")
@each(flips(10, end=0.02) | flips(5) | flips(5, start=0.98))
def test_flipped_torch_files(
    call: Call, weights: dict[str, torch.Tensor], mutation: Mutation
) -> None:
    call(CHECKPOINT, damaged(saved_by_torch(weights), "x.pth", mutation))


def test_a_pickle_is_refused_in_a_single_line(tmp_path: Path) -> None:
    """In a separate process, where warnings are not caught."""
    file = tmp_path / "x.pth"
    file.write_bytes(payload(MARK))
    line = f"quantize digits_resnet8 --data digits --checkpoint {file}"
    process = start(line.split(), cwd=tmp_path)
    _, err = process.communicate()
    assert process.returncode == 3
    taken, sentence = err.splitlines()
    assert taken.startswith("schedule for ")
    assert sentence.startswith("ricciq: ")
    assert list(tmp_path.iterdir()) == [file]


# The folder of a run


@each(SURE | HEADERS | WEIGHTS | ABOUT)
def test_what_a_run_trained(call: Call, run: Path, mutation: Mutation) -> None:
    file = damaged(run / "best.safetensors", "best.safetensors", mutation)
    for line in TRAINED.values():
        refused(call(line, file), "best.safetensors")


@each(flips(12, end=0.1) | flips(4) | BEYOND)
def test_flipped_what_a_run_trained(call: Call, run: Path, mutation: Mutation) -> None:
    file = damaged(run / "best.safetensors", "best.safetensors", mutation)
    for line in (TRAINED["eval"], TRAINED["quantize"]):
        call(line, file)


def unfinished(run: Path, place: Path) -> Path:
    """The folder of a run to resume."""
    folder = place / "out"
    shutil.copytree(run, folder)
    (folder / "report.json").unlink()
    return folder


RESUME = "quantize digits_resnet8 --data digits --recipe {quick} --output {output} --resume"


@pytest.mark.usefixtures("far_enough")
@each(SURE | HEADERS | STATES)
def test_the_state_of_a_run(call: Call, place: Path, run: Path, mutation: Mutation) -> None:
    file = unfinished(run, place) / "last.safetensors"
    file.write_bytes(mutation(file.read_bytes()))
    refused(call(RESUME), "last.safetensors")


@pytest.mark.usefixtures("far_enough")
@each(flips(8, end=0.01) | USELESS)
def test_a_flipped_state_of_a_run(call: Call, place: Path, run: Path, mutation: Mutation) -> None:
    file = unfinished(run, place) / "last.safetensors"
    file.write_bytes(mutation(file.read_bytes()))
    call(RESUME)


@each(SURE | {name: RECIPES[name] for name in ("a billion laughs", "NUL", "an unknown key")})
def test_the_recipe_of_a_run(call: Call, place: Path, run: Path, mutation: Mutation) -> None:
    file = unfinished(run, place) / "recipe.yaml"
    file.write_bytes(mutation(file.read_bytes()))
    refused(call(RESUME), "out")


@pytest.mark.usefixtures("far_enough")
@each(TABLES)
def test_the_tables_of_a_run(call: Call, place: Path, run: Path, mutation: Mutation) -> None:
    file = unfinished(run, place) / "summary.csv"
    file.write_bytes(mutation(file.read_bytes()))
    refused(call(RESUME), "summary.csv")


@each(SURE | REPORTS)
def test_the_report_of_a_run(call: Call, place: Path, run: Path, mutation: Mutation) -> None:
    folder = place / "out"
    shutil.copytree(run, folder)
    file = folder / "report.json"
    file.write_bytes(mutation(file.read_bytes()))
    refused(call("export {output}"), "report.json")


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory, quick: Path) -> Path:
    """The folder of a comparison."""
    folder = tmp_path_factory.mktemp("studies") / "study"
    answer = ricciq(*COMPARE.format(quick=quick, output=folder).split())
    assert answer.code == 0, answer.err
    return folder


COMPARE = (
    "compare digits_resnet8 --data digits --recipe {quick} --epochs 0 --methods ste,ricci "
    "--seeds 2 --output {output}"
)


@each(NOTHING_OF_THE_KIND | truncations(0.1, 0.9) | RESULTS)
def test_the_result_of_a_trial(call: Call, place: Path, study: Path, mutation: Mutation) -> None:
    folder = place / "out"
    shutil.copytree(study, folder)
    file = next(folder.glob("trials/ricci*seed1/result.json"))
    file.write_bytes(mutation(file.read_bytes()))
    refused(call(f"{COMPARE} --resume"), "result.json")


# ONNX


@each(SURE | truncations(*(n / 13 for n in range(1, 13))))
def test_onnx(call: Call, run: Path, mutation: Mutation) -> None:
    file = damaged(run / "model.onnx", "x.onnx", mutation)
    for verb in ("eval {file} --data digits", "inspect {file}", "bench {file}"):
        refused(call(verb, file), "x.onnx")


@each(flips(25) | flips(25, end=0.1) | flips(10, start=0.9) | flips(10, bits=50))
def test_flipped_onnx(call: Call, run: Path, mutation: Mutation) -> None:
    file = damaged(run / "model.onnx", "x.onnx", mutation)
    for verb in ("eval {file} --data digits", "inspect {file}", "bench {file}"):
        call(verb, file)


WRONG_NUMBERS = {"NaN": float("nan"), "infinity": float("inf")}


@pytest.mark.parametrize("number", WRONG_NUMBERS.values(), ids=WRONG_NUMBERS)
def test_onnx_whose_weights_are_not_finite(call: Call, run: Path, number: float) -> None:
    """Its outputs are meaningless, but it can be inspected and timed."""
    model = onnx.load(run / "float.onnx")
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values[:] = number
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    file = Path.cwd() / "x.onnx"
    onnx.save(model, file)
    answer = call("eval {file} --data digits", file)
    assert answer.code == 3
    refused(answer, "x.onnx", "NaN or infinite")
    for verb in ("inspect {file}", "bench {file}"):
        assert call(verb, file).code == 0
