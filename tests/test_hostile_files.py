"""Hundreds of files gone wrong: each is refused with a sentence, in time, in little memory.

Where a turned bit leaves a file valid it is used; what may not happen is anything else.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from command import Answer, ricciq
from hostility import guarded
from mutations import (
    BEYOND,
    HEADERS,
    MARK,
    NOTHING_OF_THE_KIND,
    TORCH,
    WEIGHTS,
    Mutation,
    Mutations,
    flips,
    truncations,
)
from mutations_of_data import (
    NAMES,
    PICTURES,
    PICTURES_ALL_THE_SAME,
    RECIPES,
    SHARDS,
    TARS,
    TARS_ALL_THE_SAME,
    bare,
    picture,
    tar_of,
)
from mutations_of_runs import ABOUT, REPORTS, RESULTS, STATES, TABLES, USELESS
from onnx import numpy_helper
from safetensors.torch import load_file

from ricciq import pipeline
from ricciq.errors import UsageError
from ricciq.nets import BUNDLED

QUICK = """
quantization: {reconstruction: 0, scale_search: 2}
data: {train_samples: 64, calibration_batches: 1, input_size: 8}
training: {epochs: 1}
seed: 0
device: cpu
"""
SURE = NOTHING_OF_THE_KIND | truncations(0.001, 0.1, 0.5, 0.9, 0.999)
"""What is wrong with a file of any kind."""


def each(mutations: Mutations) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mutation", mutations.values(), ids=mutations)


Call = Callable[..., Answer]


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that is done in a second."""
    path = tmp_path_factory.mktemp("quick") / "quick.yaml"
    path.write_text(QUICK)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, quick: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    line = f"quantize digits_resnet8 --data digits --recipe {quick} --output {folder}"
    answer = ricciq(*line.split())
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    return load_file(BUNDLED / "digits_resnet8.safetensors")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a command is run in, so deep that few names lead out of what is watched."""
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def call(place: Path, tmp_path: Path, quick: Path) -> Call:
    """Run a command line under guard; it may write to its output only."""

    def run(line: str, file: Path | None = None) -> Answer:
        output = place / "out"
        words = [word.format(file=file, output=output, quick=quick) for word in line.split()]
        return guarded(list(words), tmp_path, output)

    return run


@pytest.fixture
def far_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with exit code 2 once they have used what they were given."""

    def end(*_: object) -> None:
        raise UsageError("far enough; start again")

    monkeypatch.setattr(pipeline, "_export_float", lambda *_: None)
    monkeypatch.setattr(pipeline, "reconstruct", end)
    monkeypatch.setattr(pipeline, "_finish", end)


def refused(answer: Answer, *words: str) -> None:
    assert answer.code in (2, 3), answer.err
    for word in words:
        assert word in answer.err


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
    file = damaged(BUNDLED / "digits_resnet8.safetensors", "x.safetensors", mutation)
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
    """The folder of a run that is to be gone on with."""
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


@each(SURE | RESULTS)
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
    """What it answers means nothing, but it can be looked into and timed."""
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


# Recipes


@each(RECIPES)
def test_recipes(call: Call, place: Path, mutation: Mutation) -> None:
    file = place / "x.yaml"
    file.write_bytes(mutation(QUICK.encode()))
    refused(call("quantize digits_resnet8 --recipe {file} --output {output}", file), "x.yaml")
    assert not (place / "out").exists()
    assert not (place / MARK).exists()


@each(NAMES)
def test_names_in_recipes(call: Call, place: Path, mutation: Mutation) -> None:
    file = place / "x.yaml"
    file.write_bytes(mutation(QUICK.encode()))
    refused(call("quantize digits_resnet8 --recipe {file} --output {output}", file))
    assert not (place / "out").exists()


@each(flips(20) | flips(10, bits=10) | truncations(*(n / 11 for n in range(11))))
def test_flipped_recipes(call: Call, mutation: Mutation) -> None:
    file = Path.cwd() / "x.yaml"
    file.write_bytes(mutation(QUICK.encode()))
    call("quantize digits_resnet8 --data digits --recipe {file} --dry-run", file)


# Pictures and tars: the classes are those of the digits, so that what a run wrote can be evaluated


@pytest.fixture
def data(place: Path) -> Path:
    """A folder with a picture a class in each part."""
    folder = place / "data"
    for part in ("train", "val"):
        for digit in range(10):
            path = folder / part / str(digit) / "0.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(picture("PNG"))
    return folder


@pytest.fixture
def evaluate(call: Call, run: Path, data: Path) -> Callable[[], Answer]:
    return lambda: call(f"eval {run / 'model.onnx'} --data {data}")


@each(NOTHING_OF_THE_KIND | truncations(0.1, 0.5) | PICTURES)
def test_pictures(evaluate: Callable[[], Answer], data: Path, mutation: Mutation) -> None:
    path = data / "val" / "3" / "0.png"
    path.write_bytes(mutation(path.read_bytes()))
    refused(evaluate(), str(path))
    assert not Path(MARK).exists()


@each(PICTURES_ALL_THE_SAME)
def test_strange_pictures(evaluate: Callable[[], Answer], data: Path, mutation: Mutation) -> None:
    path = data / "val" / "3" / "0.png"
    path.write_bytes(mutation(path.read_bytes()))
    assert evaluate().code == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
@each(flips(8) | flips(2, bits=40) | truncations(0.2, 0.8))
def test_flipped_pictures(
    evaluate: Callable[[], Answer], data: Path, kind: str, mutation: Mutation
) -> None:
    path = data / "val" / "3" / "0.png"
    path.write_bytes(mutation(picture(kind, "RGB", (40, 30))))
    evaluate()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def circle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [pipe, endless, circle, Path.mkdir])
@pytest.mark.parametrize("part", ["train", "val"])
def test_pictures_that_are_no_files(
    evaluate: Callable[[], Answer], data: Path, make: Callable[[Path], None], part: str
) -> None:
    path = data / part / "3" / "0.png"
    path.unlink()
    make(path)
    refused(evaluate(), str(path.parent))


@pytest.fixture
def val(data: Path) -> Path:
    """The validation pictures in a tar."""
    path = data / "val.tar"
    files = {f"{digit}/0.png": picture("PNG") for digit in range(10)}
    path.write_bytes(tar_of(files))
    shutil.rmtree(data / "val")
    return path


@each(NOTHING_OF_THE_KIND | truncations(0.001, 0.1, 0.5) | TARS)
def test_tars(evaluate: Callable[[], Answer], val: Path, mutation: Mutation) -> None:
    val.write_bytes(mutation(val.read_bytes()))
    refused(evaluate(), str(val.parent))
    assert not [path for path in val.parent.parent.rglob("*") if "owned" in path.name]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_is_3_gb_of_nothing(
    evaluate: Callable[[], Answer], val: Path, kind: bytes
) -> None:
    """On a disk it takes no place."""
    good = val.read_bytes()
    with val.open("wb") as file:
        file.write(bare("x", 3 << 30, kind)(b""))
        file.seek(3 << 30, os.SEEK_CUR)
        file.write(good)
    refused(evaluate(), "val.tar", f"header of {3 << 30} bytes")


@each(TARS_ALL_THE_SAME | flips(20) | flips(10, bits=20))
def test_strange_tars(evaluate: Callable[[], Answer], val: Path, mutation: Mutation) -> None:
    val.write_bytes(mutation(val.read_bytes()))
    evaluate()


@each(SHARDS | truncations(0.2, 0.8) | flips(10))
def test_shards(call: Call, run: Path, place: Path, mutation: Mutation) -> None:
    folder = place / "shards"
    folder.mkdir()
    files = {}
    for digit in range(10):
        files |= {f"{digit}.png": picture("PNG"), f"{digit}.cls": str(digit).encode()}
    (folder / "train.tar").write_bytes(tar_of(files))
    (folder / "validation.tar").write_bytes(mutation(tar_of(files)))
    call(f"eval {run / 'model.onnx'} --data wds/x --data-dir {folder}")
