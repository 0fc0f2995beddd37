"""A folder given to --data: train/ and val/ hold class folders or class tars, or are a tar each.

Or the folder holds nothing but pictures, which then have no labels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from timm.data.readers.reader_image_folder import find_images_and_targets

from ricciq.data.sources.base import (
    IMAGE_SUFFIXES,
    EncodedPictures,
    Parts,
    PictureFiles,
    natural_order,
)
from ricciq.data.sources.tar import (
    COMPRESSED_SUFFIXES,
    Member,
    PicturesInTars,
    files_in_inner_tar,
    files_in_tar,
    refuse_compressed,
)
from ricciq.errors import DataError

Split = tuple[list[str], EncodedPictures]
LEAST_UNLABELLED = 20


def open_source(name: str, root: Path | None) -> Parts:  # noqa: ARG001
    """The class names and both parts of a data folder; no names where there are no labels.

    Args:
        name: the folder.
        root: of no use here.

    Returns:
        The class names and both parts.

    Raises:
        DataError: a part is missing or cannot be read, or they do not hold the same classes.
    """
    folder = Path(name)
    train_at, val_at = _find(folder, "train"), _find(folder, "val", "validation")
    if train_at is None and val_at is None and (unlabelled := _pictures_in(folder)):
        return _without_labels(folder, unlabelled)
    if train_at is None:
        raise DataError(
            f"data folder {folder} has no train/ in it, nor a train.tar: put the pictures to train "
            "on there, one folder a class"
        )
    if val_at is None:
        raise DataError(
            f"data folder {folder} has neither val/ nor validation/ in it, nor such a tar: put "
            "pictures that are not in train/ there, one folder a class"
        )
    class_names, train = _read_split(train_at)
    val_names, val = _read_split(val_at)
    if odd := sorted(set(class_names) ^ set(val_names), key=natural_order):
        shown = ", ".join(odd[:5]) + (", ..." if len(odd) > 5 else "")
        raise DataError(
            f"{train_at} and {val_at} do not hold the same classes ({shown} in one only): "
            "give both the same classes"
        )
    return Parts(class_names, train, val)


def _pictures_in(folder: Path) -> list[str]:
    """The pictures that lie in a folder itself, in natural order."""
    visible = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    found = [e for e in visible if e.suffix.lower() in IMAGE_SUFFIXES and e.is_file()]
    return sorted(map(str, found), key=natural_order)


def _without_labels(folder: Path, paths: list[str]) -> Parts:
    """A tenth of the pictures, always the same ones, are for validation."""
    if odd := [entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."]:
        raise DataError(
            f"data folder {folder} holds pictures and folders, such as {odd[0]}: put the pictures "
            "of each class in train/CLASS and val/CLASS, or take the folders away"
        )
    if len(paths) < LEAST_UNLABELLED:
        raise DataError(
            f"data folder {folder} holds {len(paths)} pictures: give at least {LEAST_UNLABELLED}"
        )
    order = np.random.RandomState(0).permutation(len(paths))
    parts = np.sort(order[len(paths) // 10 :]), np.sort(order[: len(paths) // 10])
    train, val = (PictureFiles([paths[i] for i in part], [0] * len(part)) for part in parts)
    return Parts([], train, val)


def _find(folder: Path, *names: str) -> Path | None:
    """Where a split lies: a folder goes before a tar, which may be left over from unpacking."""
    for name in names:
        if (inside := folder / name).is_dir():
            return inside
    for name in names:
        if (tar := folder / f"{name}.tar").is_file():
            return tar
        for suffix in COMPRESSED_SUFFIXES:
            if (compressed := folder / f"{name}{suffix}").is_file():
                refuse_compressed(compressed)
    return None


def _read_split(place: Path) -> Split:
    """The class names of a folder or tar, in timm's order, and its pictures."""
    if place.is_file():
        return _read_tar(place)
    visible = [entry for entry in place.iterdir() if not entry.name.startswith(".")]
    class_names = sorted((entry.name for entry in visible if entry.is_dir()), key=natural_order)
    tars = [entry for entry in visible if entry.suffix.lower() == ".tar" and entry.is_file()]
    for entry in visible:
        refuse_compressed(entry)
    if not class_names and not tars:
        raise DataError(
            f"{place} has no class folders in it, nor tars: put the pictures in one a class"
        )
    for entry in visible:
        if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file():
            raise DataError(f"picture {entry} lies beside the class folders: move it into one")
    if class_names and tars:
        raise DataError(f"{place} holds class folders and tars, such as {tars[0]}: keep one kind")
    if tars:
        return _read_class_tars(sorted(tars, key=lambda tar: natural_order(tar.name)))
    paths: list[str] = []
    targets: list[int] = []
    for target, class_name in enumerate(class_names):
        folder = str(place / class_name)
        files, _ = find_images_and_targets(folder, types=IMAGE_SUFFIXES)
        found = [path for path, _ in files if f"{os.sep}." not in path[len(folder) :]]
        if not found:
            raise DataError(
                f"class folder {folder} holds no pictures "
                f"({', '.join(IMAGE_SUFFIXES)}): fill or remove it"
            )
        paths += sorted(found, key=natural_order)
        targets += [target] * len(found)
    return class_names, PictureFiles(paths, targets)


def _read_class_tars(tars: list[Path]) -> Split:
    """A folder of tars, named after their class unless their own folders or tars are."""
    labelled = [pair for tar in tars for pair in _labelled(tar, files_in_tar(tar), tar.stem)]
    return _sorted_by_class(labelled)


def _read_tar(tar: Path) -> Split:
    """A split in one tar, whose folders or inner tars are named after the classes."""
    return _sorted_by_class(_labelled(tar, files_in_tar(tar), None))


def _labelled(
    tar: Path | Member, files: list[Member], class_name: str | None
) -> list[tuple[str, Member]]:
    """The pictures of a tar, those of tars in it too, each with its class.

    It is the innermost folder of the picture, or where there is none, the tar's class name.
    """
    labelled: list[tuple[str, Member]] = []
    for file in files:
        path = PurePosixPath(file.name)
        if path.suffix.lower() == ".tar":
            if isinstance(tar, Member):
                raise DataError(f"tar {file} lies in a tar within a tar: unpack {tar.archive}")
            labelled += _labelled(file, files_in_inner_tar(file), path.stem)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            folder = path.parent.name or class_name
            if folder is None:
                raise DataError(f"picture {file} lies in no class folder: put it in one and repack")
            labelled.append((folder, file))
        else:
            refuse_compressed(file)
    if not labelled:
        raise DataError(
            f"tar {tar} holds no pictures ({', '.join(IMAGE_SUFFIXES)}): fill or remove it"
        )
    return labelled


def _sorted_by_class(labelled: Iterable[tuple[str, Member]]) -> Split:
    """In the order that the same pictures would have as files in class folders."""
    ordered = sorted(
        labelled, key=lambda pair: (natural_order(pair[0]), natural_order(pair[1].name))
    )
    class_names = list(dict.fromkeys(class_name for class_name, _ in ordered))
    target = {class_name: i for i, class_name in enumerate(class_names)}
    return class_names, PicturesInTars(
        [file for _, file in ordered], [target[class_name] for class_name, _ in ordered]
    )
