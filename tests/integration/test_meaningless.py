"""What means nothing is refused before it takes time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command import ricciq
from PIL import Image


def images(folder: Path, count: int) -> Path:
    """So many images of noise, 40 pixels wide."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.RandomState(number).randint(0, 255, (40, 40, 3)).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def quantize(model: str, data: Path, output: Path, *flags: str) -> tuple[int, str]:
    """The code and the last line of a run from random weights; no run has begun."""
    recipe = output.parent / "recipe.yaml"
    recipe.write_text("model: {pretrained: false}\ndata: {input_size: 32}\n")
    words = ["quantize", model, "--recipe", recipe, "--data", data, "--bits", "8"]
    answer = ricciq(*words, "--output", output, *flags)
    assert not output.exists()
    return answer.code, answer.err.splitlines()[-1]


def test_an_encoder_without_classes(tmp_path: Path) -> None:
    data = images(tmp_path / "data", 24)
    code, line = quantize("vit_small_patch14_dinov2", data, tmp_path / "run", "--epochs", "0")
    assert code == 3
    assert line == (
        "ricciq: vit_small_patch14_dinov2 is an encoder without classes, so its outputs are "
        "features; give data with labels to train a head, or a model that has one"
    )


@pytest.mark.parametrize(
    ("train", "flags", "remedy"),
    [
        (1, [], "give more training images, as some are held out"),
        (3, ["--batch-size", "1"], "give a larger --batch-size"),
    ],
)
def test_a_batch_of_one_before_a_batchnorm(
    tmp_path: Path, train: int, flags: list[str], remedy: str
) -> None:
    for name in "ab":
        images(tmp_path / "data" / "train" / name, train)
        images(tmp_path / "data" / "val" / name, 2)
    code, line = quantize("resnet18", tmp_path / "data", tmp_path / "run", "--epochs", "1", *flags)
    assert code == 2
    assert line == (
        "ricciq: a batch of one image gives layer4.0.bn1 of resnet18, a BatchNorm, a single value "
        f"per channel, which has no variance; {remedy}, or set training.freeze_bn"
    )
