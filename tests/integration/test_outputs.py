"""Data whose classes are some outputs of a network, or are in another order than these."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from coloured import SIDE, folder_of, image, network, saved
from command import Answer, json_of, ricciq
from PIL import Image
from timm.models._hub import save_for_hf

from ricciq.data.classes import imagenet_synsets
from ricciq.deploy.session import open_session, session_metadata
from ricciq.errors import UsageError
from ricciq.recipe import Recipe
from ricciq.runs.metadata import FileMetadata
from ricciq.system.journal import Journal
from ricciq.workflows.job import Job, prepare
from ricciq.workflows.reference import Reference, evaluate_float
from ricciq.workflows.session import Session

SYNSETS = {"n02979186": "emu", "n01440764": "cat", "n02102040": "dog"}
"""Three of ImageNet's, in another order than that of their names."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(f"data: {{input_size: {SIDE}, batch_size: 10}}\ntraining: {{epochs: 0}}\n")
    return path


@pytest.fixture(scope="module")
def synsets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("synsets"), SYNSETS)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with ImageNet's thousand classes."""
    names = imagenet_synsets(1000)
    assert names is not None
    outputs = {names.index(name): colour for name, colour in SYNSETS.items()}
    return saved(tmp_path_factory.mktemp("weights") / "w.pth", outputs, 1000)


@pytest.fixture(scope="module")
def run(synsets: Path, imagenet: Path, recipe: Path, tmp_path_factory) -> tuple[Path, Answer]:
    output = tmp_path_factory.mktemp("run") / "run"
    answer = ricciq(
        *("quantize", "test_resnet", "--checkpoint", imagenet, "--data", synsets, "--bits", "8"),
        *("--recipe", recipe, "--output", output),
    )
    assert answer.code == 0, answer.err
    return output, answer


def prepared(recipe: Path, said: list[str], **flags: object) -> tuple[Job, Reference]:
    """A job with the given keys of its recipe, and what its float model reaches."""

    class Listening(Journal):
        def say(self, text: str) -> None:
            said.append(text)

    session = Session(CPU, journal=Listening())
    keys = {key.replace("__", "."): value for key, value in flags.items()}
    job = prepare(Recipe.load(recipe).override({"model.name": "test_resnet", **keys}), session)
    return job, evaluate_float(job, session)


# Some of ImageNet's classes


def test_synsets_are_outputs_of_a_network_of_imagenet(run: tuple[Path, Answer]) -> None:
    folder, answer = run
    report = json.loads((folder / "report.json").read_text())
    assert report["float"]["top1"] == 100
    assert report["onnx"]["top1"] == 100
    assert "the 3 classes of data" in answer.err
    assert "1000" in answer.err
    assert "replaced" not in answer.err
    assert any("timm's list of ImageNet" in message for message in report["messages"])
    metadata = FileMetadata.from_dict(
        session_metadata(open_session(folder / "model.onnx"), folder), folder
    )
    assert metadata.class_names == imagenet_synsets(1000)


def test_its_file_and_its_run_are_evaluated_on_any_of_the_classes(
    run: tuple[Path, Answer], tmp_path: Path
) -> None:
    folder, _ = run
    assert json_of("eval", folder / "model.onnx")["top1"] == 100
    assert json_of("eval", folder)["top1"] == 100
    others = {"n01443537": "cat", **SYNSETS}  # a goldfish that looks like a tench
    data = folder_of(tmp_path / "more", others)
    assert json_of("eval", folder / "model.onnx", "--data", data)["top1"] == 75
    odd = folder_of(tmp_path / "odd", {"n99999999": "cat", **SYNSETS})
    answer = ricciq("eval", folder / "model.onnx", "--data", odd)
    assert answer.code == 3
    assert "'n99999999'" in answer.err


@pytest.mark.slow
def test_training_keeps_the_thousand_outputs(
    synsets: Path, imagenet: Path, recipe: Path, tmp_path: Path
) -> None:
    report = json_of(
        *("quantize", "test_resnet", "--checkpoint", imagenet, "--data", synsets, "--bits", "4"),
        *("--recipe", recipe, "--epochs", "1", "--lr", "1e-5", "--output", tmp_path / "run"),
    )
    assert "float_training" not in report or not report["float_training"]
    assert report["onnx"]["top1"] > 60


def test_other_names_still_get_a_new_head(imagenet: Path, recipe: Path, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", {"cat": "cat", "n01440764": "dog"})
    plan = json_of(
        *("quantize", "test_resnet", "--checkpoint", imagenet, "--data", data),
        *("--recipe", recipe, "--epochs", "1", "--dry-run"),
    )
    assert plan["float_epochs"] == 1


# Another order


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders 1, 2 and 10, and weights that know them as torchvision sorts them: 1, 10, 2."""
    place = tmp_path_factory.mktemp("numbered")
    data = folder_of(place / "data", {"1": "cat", "2": "dog", "10": "emu"})
    return data, saved(place / "w.pth", {0: "cat", 1: "emu", 2: "dog"}, 3)


def test_classes_in_another_order_are_told(numbered: tuple[Path, Path], recipe: Path) -> None:
    data, weights = numbered
    said: list[str] = []
    job, reference = prepared(recipe, said, data__name=str(data), model__checkpoint=weights)
    assert reference.metrics.top1 < 50
    assert reference.doubt in said
    assert "would be 100.00 % with the classes in another order" in str(reference.doubt)
    assert "--class-map" in str(reference.doubt)
    assert job.data.class_names == ["1", "2", "10"]


@pytest.mark.slow
def test_a_class_map_gives_the_order(
    numbered: tuple[Path, Path], recipe: Path, tmp_path: Path
) -> None:
    data, weights = numbered
    class_map = tmp_path / "map.txt"
    class_map.write_text("1\n10\n2\n")
    report = json_of(
        *("quantize", "test_resnet", "--checkpoint", weights, "--data", data, "--bits", "8"),
        *("--recipe", recipe, "--class-map", class_map, "--output", tmp_path / "run"),
    )
    assert report["float"]["top1"] == report["onnx"]["top1"] == 100
    class_map.unlink()  # the file knows its classes
    assert json_of("eval", tmp_path / "run" / "model.onnx")["top1"] == 100
    assert json_of("eval", tmp_path / "run" / "model.onnx", "--data", data)["top1"] == 100
    (tmp_path / "other.txt").write_text("10\n1\n2\n")
    other = json_of(
        *("eval", tmp_path / "run" / "model.onnx", "--class-map", tmp_path / "other.txt"),
    )
    assert other["top1"] < 50


def test_a_study_takes_a_class_map(
    numbered: tuple[Path, Path], recipe: Path, tmp_path: Path
) -> None:
    data, weights = numbered
    (tmp_path / "map.txt").write_text("1\n10\n2\n")
    verdict = json_of(
        *("compare", "test_resnet", "--checkpoint", weights, "--data", data, "--bits", "8"),
        *("--recipe", recipe, "--class-map", tmp_path / "map.txt", "--methods", "ste,ricci"),
        *("--seeds", "2", "--output", tmp_path / "study"),
    )
    assert verdict["results"][0]["mean"] == 100


def test_a_class_map_of_more_classes_uses_these_outputs(
    numbered: tuple[Path, Path], recipe: Path, tmp_path: Path
) -> None:
    data, _ = numbered
    weights = saved(tmp_path / "w.pth", {1: "cat", 4: "emu", 3: "dog"}, 6)
    for name, content in {
        "map.txt": "a\n1\nb\n2\n10\nc\n",
        "map.json": '{"1": 1, "10": 4, "2": 3}',
    }.items():
        (tmp_path / name).write_text(content)
        job, reference = prepared(
            *(recipe, []),
            data__name=str(data),
            data__class_map=tmp_path / name,
            model__checkpoint=weights,
        )
        assert reference.metrics.top1 == 100
        assert reference.doubt is None
        assert job.metadata.class_names[3] == "2"
        assert len(job.metadata.class_names) == 6


def test_a_class_that_the_map_lacks_is_named(
    numbered: tuple[Path, Path], recipe: Path, tmp_path: Path
) -> None:
    data, weights = numbered
    (tmp_path / "map.txt").write_text("1\n10\nthree\n")
    answer = ricciq(
        *("quantize", "test_resnet", "--checkpoint", weights, "--data", data, "--bits", "8"),
        *("--recipe", recipe, "--class-map", tmp_path / "map.txt", "--output", tmp_path / "run"),
    )
    assert answer.code == 3
    assert "'2'" in answer.err
    assert "map.txt" in answer.err
    assert not (tmp_path / "run").exists()


def test_the_class_names_of_a_checkpoint_are_honoured(
    numbered: tuple[Path, Path], recipe: Path, tmp_path: Path
) -> None:
    data, _ = numbered
    model = network({0: "cat", 1: "emu", 2: "dog"}, 3)
    said: list[str] = []
    for names, top1 in ((["1", "10", "2"], 100), (["one", "ten", "two"], 33)):
        folder = tmp_path / names[0]
        hub_config = {"label_names": names}
        save_for_hf(model, str(folder), model_config=hub_config)
        _, reference = prepared(*(recipe, said), data__name=str(data), model__checkpoint=folder)
        assert int(reference.metrics.top1) == top1
    assert any("name them otherwise, such as 'one' for '1'" in text for text in said)


# What is refused before it costs time


@pytest.mark.parametrize("epochs", ["0", "1"])
def test_data_of_one_class(recipe: Path, tmp_path: Path, epochs: str) -> None:
    data = folder_of(tmp_path / "data", {"cat": "cat"})
    answer = ricciq(
        *("quantize", "test_resnet", "--data", data, "--recipe", recipe, "--epochs", epochs),
        *("--output", tmp_path / "run"),
    )
    assert answer.code == 3
    assert "a single class, 'cat'" in answer.err
    assert not (tmp_path / "run").exists()


def test_a_training_image_that_is_empty(imagenet: Path, recipe: Path, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", SYNSETS)
    bad = data / "train" / "n01440764" / "3.png"
    bad.write_bytes(b"")
    answer = ricciq(
        *("quantize", "test_resnet", "--checkpoint", imagenet, "--data", data),
        *("--recipe", recipe, "--epochs", "1", "--output", tmp_path / "run"),
    )
    assert answer.code == 3
    assert f"image {bad} cannot be read (it is empty)" in answer.err
    assert not (tmp_path / "run").exists()


def test_a_class_map_for_images_without_labels(recipe: Path, tmp_path: Path) -> None:
    for number in range(30):
        image("cat", number).save(tmp_path / f"{number}.png")
    (tmp_path / "map.txt").write_text("cat\n")
    with pytest.raises(UsageError, match="has no labels, so class map"):
        prepared(
            *(recipe, []),
            data__name=str(tmp_path),
            data__class_map=tmp_path / "map.txt",
            model__pretrained=False,
        )


# Grey images


def test_grey_images_are_rgb_for_a_network_of_colour(recipe: Path, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", {"cat": "cat", "dog": "dog"})
    for path in data.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    weights = saved(tmp_path / "w.pth", {0: "cat", 1: "dog"}, 2)
    job, _ = prepared(recipe, said := [], data__name=str(data), model__checkpoint=weights)
    assert job.preprocessing.input_size[0] == 3
    assert not any("channels" in text for text in said)
    images, _ = next(iter(job.loader("val")))
    pixels = job.preprocessing.to_pixels(images)
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    asked = {"data__name": str(data), "model__checkpoint": weights}
    job, _ = prepared(recipe, [], **asked, model__kwargs={"in_chans": 1})
    assert job.preprocessing.input_size[0] == 1
    one = timm.create_model("test_resnet", num_classes=2, in_chans=1)
    torch.save(one.state_dict(), tmp_path / "one.pth")
    job, _ = prepared(recipe, [], data__name=str(data), model__checkpoint=tmp_path / "one.pth")
    assert job.preprocessing.input_size[0] == 1
