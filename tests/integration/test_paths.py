"""Paths with spaces, letters of any language and newlines, wherever a command takes one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import Answer, ricciq
from mutations_of_data import image

from ricciq.models.bundled import BUNDLED

pytestmark = pytest.mark.slow

STRANGE = ["with spaces", "ünï çødé 日本", "new\nline", "-- [bold]{quoted} 'x' %s", "a" * 200]
ALL_AT_ONCE = " ".join([STRANGE[3], *STRANGE[:3], "a" * 150])


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of such a name with a data set, weights and a recipe."""
    folder = tmp_path / request.param
    for part in ("train", "val"):
        for digit in range(10):
            path = folder / "the data" / part / str(digit) / f"{request.param[:50]}.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(image("PNG"))
    shutil.copy(BUNDLED / "digits_resnet8.safetensors", folder / "the weights.safetensors")
    recipe = folder / "the recipe.yaml"
    recipe.write_text("quantization: {reconstruction: 0, scale_search: 2}\ndata: {input_size: 8}")
    return folder


def run(*words: str | Path) -> Answer:
    answer = ricciq(*words)
    assert answer.code == 0, answer.err
    return answer


@pytest.mark.parametrize("folder", [ALL_AT_ONCE], ids=ascii, indirect=True)
def test_every_command_takes_any_path(folder: Path) -> None:
    output, data = folder / "the run", folder / "the data"
    given = ["--data", data, "--recipe", folder / "the recipe.yaml", "--output", output]
    weights = folder / "the weights.safetensors"
    said = run("quantize", "digits_resnet8", *given, "--checkpoint", weights, "--epochs", "0")
    assert "Traceback" not in said.err
    run("eval", output, "--data", data, "--reference", output / "float.onnx")
    run("eval", output / "best.safetensors", "--data", data)
    exported = folder / "exported.onnx"
    run("export", output, "--output", exported)
    told = run("inspect", exported, "--json")
    assert json.loads(told.out)["layers"]
    run("inspect", exported)
    run("bench", exported, "--against", output / "float.onnx")
    assert {path.name for path in folder.iterdir()} == {
        "the data", "the run", "the weights.safetensors", "the recipe.yaml", "exported.onnx"
    }  # fmt: skip


@pytest.mark.parametrize("folder", [*STRANGE, ALL_AT_ONCE], ids=ascii, indirect=True)
def test_a_refusal_names_any_path_on_a_line(folder: Path) -> None:
    for line in (
        ["eval", folder / "nothing.onnx", "--data", "digits"],
        ["quantize", "digits_resnet8", "--data", folder / "nothing", "--output", folder / "out"],
        ["quantize", "digits_resnet8", "--data", "digits", "--recipe", folder / "nothing.yaml"],
        ["inspect", folder / "the weights.safetensors"],
    ):
        answer = ricciq(*line)
        assert answer.code in (2, 3)
        (sentence,) = answer.err.splitlines()
        assert sentence.startswith("ricciq: ")


@pytest.mark.parametrize("line", ["quantize {} --data digits", "eval {} --data digits",
    "inspect {}", "bench {}", "export {}", "quantize digits_resnet8 --data {}",
    "quantize digits_resnet8 --data digits --checkpoint {}.pth",
    "quantize digits_resnet8 --data digits --recipe {}",
    "quantize digits_resnet8 --data digits --output {}",
    "quantize digits_resnet8 --data wds/x --data-dir {}",
    "quantize digits_resnet8 --data torch/mnist --data-dir {}"])  # fmt: skip
def test_a_name_longer_than_any_is_refused(line: str) -> None:
    answer = ricciq(*line.format("x" * 10_000).split())
    assert answer.code in (2, 3), answer.err
    *taken, sentence = answer.err.splitlines()
    assert sentence.startswith("ricciq: ")
    assert len(sentence) < 1000
    assert len(taken) <= 1
    assert all(line.startswith("schedule for 1365 images") for line in taken)
