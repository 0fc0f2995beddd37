"""ONNX files that other tools wrote are evaluated with what the user says about them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from coloured import SIDE, folder_of, network
from command import Answer, json_of, ricciq
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from PIL import Image
from torch import Tensor, nn

ORDER = ["emu", "cat", "dog"]
"""The classes of the files, which have no names in them."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZED = ["--mean", *map(str, MEAN), "--std", ",".join(map(str, STD))]


class OfPixels(nn.Module):
    """Takes bytes, (batch, height, width, 3)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std)


class ChannelsLast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.permute(0, 3, 1, 2))


class TwoOutputs(ChannelsLast):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits, logits + 1


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network(dict(enumerate(ORDER)), 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("other")
    (place / "map.txt").write_text("\n".join(ORDER))
    folder_of(place / "data", {name: name for name in ORDER}, ["val"])
    return place


@pytest.fixture(scope="module")
def export(place: Path, model: nn.Module) -> Callable[..., Path]:
    """Writes a file with torch.onnx, once for each name."""

    def write(name: str, wrap: Callable[[nn.Module], nn.Module] | None = None, **axes: object):
        path = place / f"{name}.onnx"
        example = torch.zeros(1, SIDE, SIDE, 3)
        example = example.byte() if name == "pixels" else example
        example = example if wrap else example.permute(0, 3, 1, 2)
        module = wrap(model) if wrap else model
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(
                module.eval(), (example,), path, dynamo=False, input_names=["x"], **axes
            )
        return path

    return write


def eval_(path: Path, *flags: str | Path) -> dict[str, object]:
    return json_of("eval", path, "--data", path.parent / "data", *flags)


def refused(answer: Answer, *words: str) -> None:
    assert answer.code in (2, 3), answer.err
    assert answer.err.count("\n") == 1, answer.err
    for word in words:
        assert word in answer.err


AXES = {
    "one": {},
    "any": {"dynamic_axes": {"x": {0: "batch"}}},
}


@pytest.mark.parametrize("name", AXES)
def test_a_file_of_torch_is_evaluated(export, place: Path, name: str) -> None:
    path = export(name, **AXES[name])
    found = eval_(path, *NORMALIZED, "--class-map", place / "map.txt", "--crop-pct", "0.9")
    assert (found["top1"], found["samples"]) == (100, 30)
    answer = ricciq("eval", path, "--data", place / "data", *NORMALIZED)
    assert "100.00 % with the classes in another order" in answer.err
    assert f"images are given to {path} as 3x{SIDE}x{SIDE}, bilinear, crop 1" in answer.err


def test_without_flags_the_sentence_names_them(export, place: Path) -> None:
    path = export("bare")
    for flags in ([], ["--crop-pct", "0.9"], ["--mean", "0.5"]):
        answer = ricciq("eval", path, "--data", place / "data", *flags)
        refused(answer, str(path), "--mean", "--std", "--input-size", "--class-map", "--like")
    image = place / "data" / "val" / "cat" / "0.png"
    refused(ricciq("predict", path, image), "--mean", "--like")


def test_an_int8_file_of_onnxruntime_is_evaluated(export, place: Path) -> None:
    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = sorted((place / "data").rglob("*.png"))

        def get_next(self) -> dict[str, np.ndarray] | None:
            if not self.left:
                return None
            pixels = np.asarray(Image.open(self.left.pop()), np.float32) / 255
            return {"x": ((pixels - MEAN) / STD).transpose(2, 0, 1)[None].astype(np.float32)}

    path = export("float")
    int8 = path.with_name("int8.onnx")
    quantize_static(path, int8, Images())
    assert eval_(int8, *NORMALIZED, "--class-map", place / "map.txt")["top1"] == 100


def test_a_size_that_is_not_fixed_is_given(export, place: Path) -> None:
    path = export("sizes", dynamic_axes={"x": {0: "batch", 2: "height", 3: "width"}})
    refused(ricciq("eval", path, "--data", place / "data", *NORMALIZED), "--input-size")
    flags = [*NORMALIZED, "--class-map", place / "map.txt"]
    for size in (["32"], ["3", "32", "32"], ["32,32"]):
        assert eval_(path, *flags, "--input-size", *size)["top1"] == 100
    fixed = export("fixed")
    refused(ricciq("eval", fixed, *flags, "--input-size", "48"), "(3, 32, 32)", "(3, 48, 48)")


def test_pixels_need_no_normalization(export, place: Path) -> None:
    path = export("pixels", OfPixels, dynamic_axes={"x": {0: "batch"}})
    assert ort.InferenceSession(path).get_inputs()[0].type == "tensor(uint8)"
    assert eval_(path, "--class-map", place / "map.txt")["top1"] == 100
    (image,) = json_of(
        *("predict", path, place / "data" / "val" / "dog" / "1.png"),
        *("--class-map", place / "map.txt"),
    )["images"]
    assert image["classes"][0]["class"] == "dog"


def test_other_inputs_and_outputs_are_refused(export, place: Path) -> None:
    flags = ["--data", place / "data", *NORMALIZED]
    refused(ricciq("eval", export("last", ChannelsLast), *flags), "32 channels", "(batch, 1 or 3")
    refused(ricciq("eval", export("two", TwoOutputs), *flags), "outputs")


@pytest.mark.slow
def test_a_file_is_like_a_run(digits_run: Callable[..., Path], tmp_path: Path) -> None:
    from ricciq.models.factory import load_model

    run = digits_run("--bits", "8", "--epochs", "0")
    path = tmp_path / "other.onnx"
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            load_model("digits_resnet8", channels=1).model,
            *((torch.zeros(1, 1, 8, 8),), path),
            dynamo=False,
        )
    found = json_of("eval", path, "--data", "digits", "--like", run)
    assert found["top1"] == json_of("eval", run / "float.onnx", "--data", "digits")["top1"]
    both = ["--reference", run / "float.onnx", "--like", run / "model.onnx", "--data", "digits"]
    assert json_of("eval", path, *both)["agreement"] == 100


INVALID = {
    "two means": ["--mean", "0.5", "0.5"],
    "words": ["--mean", "grey"],
    "no deviation": ["--std", "0"],
    "a crop of nothing": ["--crop-pct", "0"],
    "magic": ["--interpolation", "magic"],
    "half a pixel": ["--input-size", "32.5"],
    "a split": ["--split", "train"],
}


@pytest.mark.parametrize("flags", INVALID.values(), ids=INVALID)
def test_invalid_flags(place: Path, flags: list[str]) -> None:
    refused(ricciq("eval", place / "one.onnx", "--data", place / "data", *flags), flags[0])
