"""A folder given to --data: train/ and val/ have a folder or a tar for each class, or are tars.

Or the folder has only images, which then have no labels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ricciq.data.sources.base import IMAGE_SUFFIXES, EncodedImages, Parts
from ricciq.data.sources.catalog import EvaluationSplit
from ricciq.data.sources.files import ImageFiles, images_below, is_rubbish, told_unused
from ricciq.data.sources.tar import (
    COMPRESSED_SUFFIXES,
    ImagesInTars,
    Member,
    files_in_inner_tar,
    files_in_tar,
    refuse_compressed,
)
from ricciq.errors import DataError
from ricciq.system.natural_order import natural_order

Split = tuple[list[str], EncodedImages]
NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
"""Names of the parts of a data folder, in any case."""
LEAST_UNLABELLED = 20
"""Smallest number of images without labels."""


def open_source(name: str, root: Path | None) -> Parts:  # noqa: ARG001
    """Open a data folder.

    Args:
        name: the folder.
        root: ignored.

    Returns:
        The class names and both parts; no class names if there are no labels.

    Raises:
        DataError: a part is missing or cannot be read, or the parts have different classes.
    """
    folder = Path(name)
    found = {split: place for split in NAMES if (place := _find(folder, split))}
    if not found and (unlabelled := _images_in(folder)):
        return _without_labels(folder, unlabelled)
    if "train" not in found:
        raise DataError(
            f"data folder {folder} has neither train/ nor train.tar; put the training images "
            "there, one folder for each class; without them, it can only be evaluated on"
        )
    messages = []
    if "val" not in found and "test" in found:
        found["val"] = found.pop("test")
        messages.append(f"{found['val']} is used for validation: there is no {folder / 'val'}")
    if "val" not in found:
        raise DataError(
            f"data folder {folder} has neither val/ nor validation/, nor such a tar; put images "
            "that are not in train/ there, one folder for each class"
        )
    left_out = _not_used(folder, [found["train"], found["val"]])
    class_names, train = _read_split(found["train"], left_out)
    val_names, val = _read_split(found["val"], left_out)
    if odd := sorted(set(class_names) ^ set(val_names), key=natural_order):
        shown = ", ".join(odd[:5]) + (", ..." if len(odd) > 5 else "")
        raise DataError(
            f"{found['train']} and {found['val']} do not have the same classes ({shown} in one "
            "only); give both the same classes"
        )
    return Parts(class_names, train, val, [*messages, *told_unused(left_out)])


def open_split(name: str, split: EvaluationSplit) -> Parts:
    """Open the images of a data folder to evaluate on.

    Args:
        name: the folder. It may have a part of this name, or for "val" a test/ alone, or class
            folders and no parts.
        split: which images.

    Returns:
        The class names, and the images as the validation images.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    folder = Path(name)
    found = {known: place for known in NAMES if (place := _find(folder, known))}
    place, messages = found.get(split), []
    if place is None and split == "val" and "test" in found:
        place = found["test"]
        messages.append(f"{place} is evaluated: there is no {folder / 'val'}")
    if not found and split == "val":
        if unlabelled := _images_in(folder):
            return _without_labels(folder, unlabelled)
        place = folder
    if place is None:
        others = " and ".join(str(other) for other in found.values()) or "no split"
        raise DataError(
            f"data folder {folder} has {others}, but no {split}/; give images that are not in "
            "train/, one folder for each class"
        )
    left_out = [] if place == folder else _not_used(folder, list(found.values()))
    class_names, images = _read_split(place, left_out)
    return Parts(class_names, None, images, [*messages, *told_unused(left_out)])


def _not_used(folder: Path, used: Sequence[Path]) -> list[str]:
    """What lies in a folder beside what is used, but for rubbish."""
    others = sorted(entry for entry in {*folder.iterdir()} - {*used} if not is_rubbish(entry.name))
    return [f"{entry}{os.sep if entry.is_dir() else ''}" for entry in others]


def _images_in(folder: Path) -> list[str]:
    """The images directly in a folder, in natural order."""
    with os.scandir(folder) as entries:
        visible = (entry for entry in entries if not entry.name.startswith("."))
        found = [e.path for e in visible if e.name.lower().endswith(IMAGE_SUFFIXES) and e.is_file()]
    return sorted(found, key=natural_order)


def _without_labels(folder: Path, paths: list[str]) -> Parts:
    """Split images without labels: a fixed tenth of them is for validation."""
    if odd := [entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."]:
        raise DataError(
            f"data folder {folder} has both images and folders, such as {odd[0]}; put the images "
            "of each class in train/CLASS and val/CLASS, or remove the folders"
        )
    if len(paths) < LEAST_UNLABELLED:
        raise DataError(
            f"data folder {folder} has {len(paths)} images; give at least {LEAST_UNLABELLED}"
        )
    order = np.random.RandomState(0).permutation(len(paths))
    parts = np.sort(order[len(paths) // 10 :]), np.sort(order[: len(paths) // 10])
    train, val = (ImageFiles((paths[i], 0) for i in part) for part in parts)
    return Parts([], train, val, [*told_unused(_not_used(folder, [Path(path) for path in paths]))])


def _find(folder: Path, split: str) -> Path | None:
    """The path of a split: a folder goes before a tar, which may be left from unpacking."""
    # In ASCII, lower case comes last, so that train/ goes before Train/.
    entries = {entry.name.lower(): entry for entry in sorted(folder.iterdir())}
    for name in NAMES[split]:
        if name in entries and entries[name].is_dir():
            return entries[name]
    for name in NAMES[split]:
        if (tar := entries.get(f"{name}.tar")) and tar.is_file():
            return tar
        for suffix in COMPRESSED_SUFFIXES:
            if (compressed := entries.get(f"{name}{suffix}")) and compressed.is_file():
                refuse_compressed(compressed)
    return None


def _read_split(place: Path, left_out: list[str]) -> Split:
    """The class names of a folder or tar, in timm's order, and its images.

    Args:
        place: the folder or tar.
        left_out: receives what is in it and is not used.
    """
    if place.is_file():
        return _read_tar(place, left_out)
    entries = sorted(place.iterdir())
    for entry in entries:
        refuse_compressed(entry)
    visible = [entry for entry in entries if not (entry.name[0] == "." or is_rubbish(entry.name))]
    class_names = sorted((entry.name for entry in visible if entry.is_dir()), key=natural_order)
    tars = [entry for entry in visible if entry.suffix.lower() == ".tar" and entry.is_file()]
    if not class_names and not tars:
        raise DataError(
            f"{place} has neither class folders nor tars; give each class a folder with its images"
        )
    for entry in visible:
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.is_dir():
            raise DataError(f"image {entry} is beside the class folders; move it into one")
    if class_names and tars:
        raise DataError(f"{place} has class folders and tars, such as {tars[0]}; keep one kind")
    left_out += _not_used(place, [*tars, *(place / name for name in class_names)])
    if tars:
        return _read_class_tars(sorted(tars, key=lambda tar: natural_order(tar.name)), left_out)
    return class_names, ImageFiles(_labelled_files(place, class_names, left_out))


def _labelled_files(
    place: Path, class_names: list[str], left_out: list[str]
) -> Iterator[tuple[str, int]]:
    """The images of each class folder, with the number of the class."""
    for target, class_name in enumerate(class_names):
        folder = str(place / class_name)
        others: list[str] = []
        found = images_below(folder, others)
        if not found:
            but = f" but {others[0]}" if others else ""
            raise DataError(
                f"class folder {folder} has no images ({', '.join(IMAGE_SUFFIXES)}){but}; fill or "
                "remove it"
            )
        left_out += others
        for path in found:
            yield path, target


def _read_class_tars(tars: list[Path], left_out: list[str]) -> Split:
    """The images of a folder of tars; a tar without folders or tars in it is a class."""
    labelled = [
        pair for tar in tars for pair in _labelled(tar, files_in_tar(tar), tar.stem, left_out)
    ]
    return _sorted_by_class(labelled)


def _read_tar(tar: Path, left_out: list[str]) -> Split:
    """The images of one tar, whose folders or inner tars are the classes."""
    return _sorted_by_class(_labelled(tar, files_in_tar(tar), None, left_out))


def _labelled(
    tar: Path | Member, files: list[Member], class_name: str | None, left_out: list[str]
) -> list[tuple[str, Member]]:
    """The images of a tar and of the tars in it, each with its class.

    The class is the innermost folder of the image, or without a folder the name of the tar.
    """
    labelled: list[tuple[str, Member]] = []
    for file in files:
        path = PurePosixPath(file.name)
        if path.suffix.lower() == ".tar":
            if isinstance(tar, Member):
                raise DataError(f"tar {file} is in a tar within a tar; unpack {tar.archive}")
            labelled += _labelled(file, files_in_inner_tar(file), path.stem, left_out)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            folder = path.parent.name or class_name
            if folder is None:
                raise DataError(f"image {file} is in no class folder; put it in one and repack")
            labelled.append((folder, file))
        else:
            refuse_compressed(file)
            if not is_rubbish(path.name):
                left_out.append(str(file))
    if not labelled:
        raise DataError(f"tar {tar} has no images ({', '.join(IMAGE_SUFFIXES)}); fill or remove it")
    return labelled


def _sorted_by_class(labelled: Iterable[tuple[str, Member]]) -> Split:
    """A split of these images, in the order they would have as files in class folders."""
    ordered = sorted(
        labelled, key=lambda pair: (natural_order(pair[0]), natural_order(pair[1].name))
    )
    class_names = list(dict.fromkeys(class_name for class_name, _ in ordered))
    target = {class_name: i for i, class_name in enumerate(class_names)}
    return class_names, ImagesInTars(
        [file for _, file in ordered], [target[class_name] for class_name, _ in ordered]
    )
