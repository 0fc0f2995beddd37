"""The commands as people type them: without what the tool can find out by itself."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import json_of, ricciq
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import ImageNetInfo

from ricciq.convert.rewrite import quantize
from ricciq.data.open import find_again
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.export import export_onnx
from ricciq.errors import DataError, ModelError
from ricciq.models.factory import load_model
from ricciq.quant.calibration import calibrate
from ricciq.workflows.predict import _readable, predict

pytestmark = pytest.mark.slow


@pytest.fixture
def runs(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the only finished run of the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished_run, tmp_path / "runs" / "newest")).relative_to(tmp_path)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of digits, two of each, in a folder for each digit."""
    folder, found = tmp_path_factory.mktemp("digits"), load_digits()
    for digit in range(10):
        for number in np.flatnonzero(found.target == digit)[:2]:
            path = folder / str(digit) / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray((found.images[number] * 255 / 16).astype(np.uint8)).save(path)
    return folder


# eval, export, report, inspect, bench


def test_eval_finds_the_file_and_its_data(runs: Path) -> None:
    top1 = json.loads((runs / "report.json").read_text())["onnx"]["top1"]
    answer = ricciq("eval", "--json")
    assert answer.code == 0, answer.err
    assert answer.err.splitlines() == [
        f"{runs} is taken: the newest finished run",
        f"digits is taken: the data that {runs / 'model.onnx'} was made with",
    ]
    values = json.loads(answer.out)
    assert values["target"] == str(runs / "model.onnx")
    assert (values["data"], values["top1"]) == ("digits", top1)
    for path in (runs, runs / "model.onnx", runs / "best.safetensors"):
        assert json_of("eval", path)["top1"] == pytest.approx(top1, abs=5)


def test_the_other_commands_take_the_newest_run_and_any_path_into_one(runs: Path) -> None:
    before = (runs / "model.onnx").read_bytes()
    for path in ([], [runs], [runs / "model.onnx"], [runs / "best.safetensors"]):
        assert json_of("export", *path)["path"] == str(runs / "model.onnx")
        assert (runs / "model.onnx").read_bytes() == before
        assert json_of("report", *path)["pages"][1] == str(runs / "report.html")
        assert json_of("inspect", *path)["metadata"]["class_names"][3] == "3"
        assert json_of("bench", *path)["file_ms"] > 0
    compared = json_of("bench", "--against", runs / "float.onnx")
    assert compared["ratio"] > 0


@pytest.mark.parametrize(
    ("batch", "name"), [([], "model-uint8.onnx"), (["--batch", "3"], "model-uint8-batch3.onnx")]
)
def test_a_file_of_pixels_serves_like_one_of_float_images(
    runs: Path, digits: Path, batch: list[str], name: str
) -> None:
    usual = runs / "model.onnx"
    before = usual.read_bytes()
    written = json_of("export", "--input", "uint8", *batch)
    path = Path(written["path"])
    assert (path, written["input"]) == (runs / name, "uint8")
    assert usual.read_bytes() == before
    found = json_of("eval", path, "--reference", usual, "--min-agreement", "100")
    assert found["top1"] == found["reference_top1"]
    assert (found["samples"], found["max_abs_diff"]) == (360, 0)
    assert json_of("eval", usual, "--reference", path)["agreement"] == 100
    of_usual, of_pixels = (json_of("predict", file, digits)["images"] for file in (usual, path))
    assert len(of_pixels) == 20
    assert of_pixels == of_usual
    assert json_of("bench", path, "--against", usual, *batch)["ratio"] > 0
    about = json_of("inspect", path)["metadata"]
    assert about == {**json_of("inspect", usual)["metadata"], "input": "uint8"}
    assert "uint8" in ricciq("inspect", path).out


@pytest.mark.parametrize("verb", ["eval", "export", "report", "inspect", "bench"])
def test_without_any_run_one_has_to_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = ricciq(verb)
    assert answer.code == 2
    assert answer.err.startswith(f"ricciq: there is no finished run in {tmp_path}")
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize("verb", ["eval", "export", "report", "inspect", "bench"])
def test_a_path_that_does_not_exist_is_named(tmp_path: Path, verb: str) -> None:
    answer = ricciq(verb, tmp_path / "nothing")
    assert answer.code == 3
    assert str(tmp_path / "nothing") in answer.err
    assert answer.err.count("\n") == 1


# The data that a file was made with


def test_data_are_found_from_the_folder_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "x"
    for folder in (run, tmp_path / "images", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    there = str((tmp_path / "images").resolve())
    monkeypatch.chdir(tmp_path)
    assert find_again("images", None, run) == (there, None)
    assert find_again("images", None, Path("/")) == ("images", None)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_again("images", None, run) == (there, None)
    assert find_again("./images", None, run / "model.onnx") == (there, None)
    assert find_again("hfds/./images", None, run) == (f"hfds/{there}", None)
    assert find_again("torch/mnist", Path("images"), run) == ("torch/mnist", Path(there))
    assert find_again("digits", None, run) == ("digits", None)
    assert find_again("hfds/user/set", None, run) == ("hfds/user/set", None)
    assert find_again("hfds/user/set", Path("cache"), run) == ("hfds/user/set", Path("cache"))
    for name, root in (("gone", None), ("torch/mnist", Path("gone")), ("/gone", None)):
        with pytest.raises(DataError, match=r"gone that .* was made with are no longer there"):
            find_again(name, root, run)


def export_of_another_tool(path: Path, data: str | None) -> Path:
    """A file of a random network of ten classes."""
    loaded = load_model("digits_resnet8", num_classes=10, channels=1, pretrained=False, seed=0)
    images = torch.rand(4, 1, 8, 8)
    quantize(loaded.model, images, 8, 8)
    calibrate(loaded.model, [images])
    stored = {"class_names": [*"0123456789"]}
    if data is not None:
        stored |= {"recipe": {"data": {"name": data}}}
    return export_onnx(loaded.model, path, Preprocessing((1, 8, 8), (0.5,), (0.5,)), stored)


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [(None, 2, "does not name the data it was made with"), ("./gone", 3, "no longer there")],
)
def test_a_file_without_its_data_is_refused(
    tmp_path: Path, data: str | None, code: int, said: str
) -> None:
    file = export_of_another_tool(tmp_path / "model.onnx", data)
    answer = ricciq("eval", file)
    assert answer.code == code
    assert said in answer.err
    assert answer.err.endswith("give --data\n")
    assert json_of("eval", file, "--data", "digits")["samples"] == 360


# predict


def test_most_digits_are_told(finished_run: Path, digits: Path) -> None:
    for target in (finished_run, finished_run / "model.onnx", finished_run / "best.safetensors"):
        images = json_of("predict", target, digits)["images"]
        assert len(images) == 20
        right = [Path(row["image"]).parent.name == row["classes"][0]["class"] for row in images]
        assert sum(right) >= 18
        for row in images:
            found = [c["probability"] for c in row["classes"]]
            assert len(found) == 5
            assert found == sorted(found, reverse=True)
            assert 0 < sum(found) <= 1 + 1e-9
            assert [c["class"] for c in row["classes"]] == [str(c["index"]) for c in row["classes"]]


def test_images_are_files_folders_and_patterns(
    finished_run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits)
    first = sorted(Path("3").iterdir())[0]
    many = predict(str(finished_run), [str(first)] * 40, top=99)["images"]
    assert [row["image"] for row in many] == [str(first)] * 40
    assert all(len(row["classes"]) == 10 for row in many)
    table = tmp_path / "classes.csv"
    answer = ricciq("predict", finished_run, first, "4", "5/*.png", "--top", "1", "--csv", table)
    assert answer.code == 0, answer.err
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"].split("/")[0] for row in rows] == ["3", "4", "4", "5", "5"]
    assert list(rows[0]) == ["image", "class1", "probability1"]
    assert all(0 < float(row["probability1"]) <= 1 for row in rows)
    for row in rows:
        assert row["image"] in answer.out


def test_a_table_does_not_replace_an_image(digits: Path, tmp_path: Path) -> None:
    image = Path(shutil.copy(next(digits.glob("3/*")), tmp_path))
    before = image.read_bytes()
    for table in (image, tmp_path / "missing" / "classes.csv"):
        answer = ricciq("predict", "model.onnx", image, "--csv", table)
        assert answer.code == 2
        assert answer.err.startswith("ricciq: ")
        assert "--csv" in answer.err
    assert image.read_bytes() == before
    assert list(tmp_path.iterdir()) == [image]


def test_a_broken_image_is_named_and_the_others_are_answered(
    finished_run: Path, digits: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "images"))
    (folder / "3" / "broken.png").write_bytes(b"\x89PNG and no more")
    (folder / "4" / "text.jpg").write_text("a letter")
    (folder / "4" / "notes.txt").write_text("a letter")
    answer = ricciq("predict", finished_run, folder, "--json")
    assert answer.code == 3
    values = json.loads(answer.out)
    assert len(values["images"]) == 20
    assert [Path(row["image"]).name for row in values["failed"]] == ["broken.png", "text.jpg"]
    unused, *lines = answer.err.splitlines()
    assert unused.startswith(f"not used: {folder / '4' / 'notes.txt'}; images are read from .png")
    assert [unused] == values["messages"]
    assert len(lines) == 2
    for line, name in zip(lines, ("broken.png", "text.jpg"), strict=True):
        assert line.startswith("ricciq: image ")
        assert name in line


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("missing.png", "image 'missing.png' does not exist"),
        ("*.bmp", r"no file matches \*\.bmp"),
        ("empty", "folder empty has no images"),
    ],
)
def test_no_image_is_refused(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=said):
        predict(str(finished_run), [image])


def test_a_target_that_is_nothing_is_refused(digits: Path) -> None:
    with pytest.raises(ModelError, match="'resnet_18' does not exist; give"):
        predict("resnet_18", [str(digits)])


def test_a_model_of_timm_names_its_classes(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        return load_model(name, pretrained=False, seed=0)

    monkeypatch.setattr("ricciq.workflows.predict.load_model", load)
    (row,) = predict("test_resnet", [str(next(digits.glob("3/*")))], top=2000)["images"]
    names = {c["index"]: c["class"] for c in row["classes"]}
    assert len(names) == 1000
    assert names[0] == "tench, Tinca tinca"
    assert math.isclose(sum(c["probability"] for c in row["classes"]), 1)


def test_only_the_classes_of_imagenet_get_its_names() -> None:
    numbers = [str(i) for i in range(1000)]
    assert _readable(numbers, labelled=False)[0] == "tench, Tinca tinca"
    assert _readable(numbers, labelled=True) == numbers
    wordnet = ImageNetInfo().label_names()
    assert _readable(wordnet, labelled=True)[0] == "tench, Tinca tinca"
    unknown = [f"n{i:08}" for i in range(1000)]
    assert _readable(unknown, labelled=True) == unknown
    assert _readable(["cat", "dog"], labelled=False) == ["cat", "dog"]
