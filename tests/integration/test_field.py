"""Trouble that users of such tools have reported: one run that meets all of it at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from command import ricciq
from PIL import Image

from ricciq.cli.request import Request, requested_recipe
from ricciq.data.open import open_data
from ricciq.data.sources.base import IMAGE_SUFFIXES
from ricciq.errors import CheckpointError

MODEL = "digits_resnet8"
SUFFIXES = (".webp", ".bmp", ".TIF", ".gif", ".ppm", ".jp2", ".jfif")
LATIN_1 = os.fsdecode(b"stra\xdfe")
"""A folder out of an old zip file."""
STRANGE = ["--cat\n\N{CAT FACE}", 'dog\'s "<b>"' + 200 * "!", "street"]
"""Names that need care on a command line, in a table, in JSON and in HTML."""


def write(path: Path, tone: int, seed: int) -> None:
    """An image of a tone; as a PNG with a palette and transparency, of which PIL warns."""
    noise = np.random.RandomState(seed).randn(16, 16, 3) * 20
    image = Image.fromarray(np.clip(tone + noise, 0, 255).astype("uint8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        image.quantize(16).save(path, transparency=bytes([0] + [200] * 15))
    else:
        image.save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with strange names, one of which is no UTF-8, of images in every format."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for label, name in enumerate(STRANGE):
            for n, suffix in enumerate((".png", *SUFFIXES)):
                write(folder / split / name / f"{n}{suffix}", 60 + 60 * label, n)
        try:
            (folder / split / "street").rename(folder / split / LATIN_1)
        except OSError:
            pytest.skip("this file system takes UTF-8 only")
    return folder


class Run(NamedTuple):
    folder: Path
    err: str
    report: dict[str, Any]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A quiet run without a home, in a folder that is called as its model."""
    folder = tmp_path_factory.mktemp("runs") / MODEL
    flags = ["--bits", "8", "--epochs", "1", "--batch-size", "8", "--quiet", "--json"]
    flags += ["--output", MODEL]
    done = subprocess.run(
        [sys.executable, "-m", "ricciq", "quantize", MODEL, "--data", data, *flags],
        cwd=folder.parent,
        env={**os.environ, "HOME": "/proc/1/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Run(folder, done.stderr, json.loads(done.stdout))


@pytest.mark.slow
def test_quiet_is_quiet(run: Run) -> None:
    assert run.err == ""


@pytest.mark.slow
def test_images_of_every_format_are_used(run: Run, data: Path) -> None:
    assert run.report["float"]["samples"] == len([p for p in data.glob("val/*/*") if p.is_file()])


@pytest.mark.slow
def test_a_class_name_that_is_no_utf_8_is_written_with_escapes(run: Run, data: Path) -> None:
    assert open_data(str(data), None).class_names == [*STRANGE[:2], "stra\\udcdfe"]
    assert (run.folder / "report.html").is_file()


@pytest.mark.slow
def test_an_onnx_file_may_be_called_in_capitals(run: Run, data: Path) -> None:
    file = Path(shutil.copy(run.folder / "model.onnx", run.folder.parent / "MODEL.ONNX"))
    answer = ricciq("eval", file, "--data", data, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["top1"] == pytest.approx(run.report["onnx"]["top1"])


@pytest.mark.slow
def test_a_model_goes_before_a_folder_of_its_name(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.folder.parent)

    def asked(name: str) -> Request:
        return requested_recipe(name, None, "none", (None,) * 4, {"data.name": "digits"})

    recipe, messages, _ = asked(MODEL)
    assert (recipe.model.name, recipe.model.checkpoint) == (MODEL, None)
    assert messages == [
        f"{MODEL} is taken as the name of a model, not of the file or folder here; give ./{MODEL} "
        "to start from that"
    ]
    with pytest.raises(CheckpointError, match="quantized already"):
        asked(f"./{MODEL}")


def test_suffixes_are_in_lower_case_and_different() -> None:
    assert len({suffix.lower() for suffix in IMAGE_SUFFIXES}) == len(IMAGE_SUFFIXES)
