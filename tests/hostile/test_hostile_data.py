"""Hundreds of damaged recipes, images and tars, refused as in `test_hostile_files`."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Answer
from hostility import QUICK, Call, each, refused
from mutations import MARK, NOTHING_OF_THE_KIND, Mutation, flips, truncations
from mutations_of_data import (
    IMAGES,
    IMAGES_ALL_THE_SAME,
    NAMES,
    RECIPES,
    SHARDS,
    TARS,
    TARS_ALL_THE_SAME,
    bare,
    image,
    tar_of,
)

pytestmark = [pytest.mark.hostile, pytest.mark.slow]

pytest_plugins = ["hostility"]

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


# Images and tars: the classes are those of the digits, so that what a run wrote can be evaluated


@pytest.fixture
def data(place: Path) -> Path:
    """A folder with one image for each class in each part."""
    folder = place / "data"
    for part in ("train", "val"):
        for digit in range(10):
            path = folder / part / str(digit) / "0.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(image("PNG"))
    return folder


@pytest.fixture
def evaluate(call: Call, run: Path, data: Path) -> Callable[[], Answer]:
    return lambda: call(f"eval {run / 'model.onnx'} --data {data}")


@each(NOTHING_OF_THE_KIND | truncations(0.1, 0.5) | IMAGES)
def test_images(evaluate: Callable[[], Answer], data: Path, mutation: Mutation) -> None:
    path = data / "val" / "3" / "0.png"
    path.write_bytes(mutation(path.read_bytes()))
    refused(evaluate(), str(path))
    assert not Path(MARK).exists()


@each(IMAGES_ALL_THE_SAME)
def test_strange_images(evaluate: Callable[[], Answer], data: Path, mutation: Mutation) -> None:
    path = data / "val" / "3" / "0.png"
    path.write_bytes(mutation(path.read_bytes()))
    assert evaluate().code == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
@each(flips(8) | flips(2, bits=40) | truncations(0.2, 0.8))
def test_flipped_images(
    evaluate: Callable[[], Answer], data: Path, kind: str, mutation: Mutation
) -> None:
    path = data / "val" / "3" / "0.png"
    path.write_bytes(mutation(image(kind, "RGB", (40, 30))))
    evaluate()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def circle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [pipe, endless, circle, Path.mkdir])
@pytest.mark.parametrize("part", ["train", "val"])
def test_images_that_are_no_files(
    call: Call, data: Path, make: Callable[[Path], None], part: str
) -> None:
    path = data / part / "3" / "0.png"
    path.unlink()
    make(path)
    line = f"quantize digits_resnet8 --data {data} --bits 8 --epochs 0 --output {{output}}"
    refused(call(line), str(path.parent))
    assert not (data.parent / "out").exists()


@pytest.fixture
def val(data: Path) -> Path:
    """The validation images in a tar."""
    path = data / "val.tar"
    files = {f"{digit}/0.png": image("PNG") for digit in range(10)}
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
    """A sparse file, which takes no space on a disk."""
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
        files |= {f"{digit}.png": image("PNG"), f"{digit}.cls": str(digit).encode()}
    (folder / "train.tar").write_bytes(tar_of(files))
    (folder / "validation.tar").write_bytes(mutation(tar_of(files)))
    call(f"eval {run / 'model.onnx'} --data wds/x --data-dir {folder}")
