"""Classify images with a file, a run, or a model of timm."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from timm import is_model
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from ricciq.data.sources.base import IMAGE_SUFFIXES
from ricciq.data.sources.files import ImageFiles, images_below, told_unused
from ricciq.errors import DataError, ModelError
from ricciq.models.factory import load_model
from ricciq.models.kind import number_of_classes
from ricciq.models.names import architecture
from ricciq.runs.metadata import ModelMetadata
from ricciq.system.natural_order import natural_order
from ricciq.workflows.saved import NOTHING_GIVEN, Given, Target, open_target

BATCH = 32
"""Images in a call."""
_GLOB = re.compile(r"[*?\[]")
_WORDNET = re.compile(r"n\d{8}")


def predict(
    target: str, images: Sequence[str], top: int = 5, given: Given = NOTHING_GIVEN
) -> dict[str, Any]:
    """Find the most likely classes of images.

    Args:
        target: an ONNX file, a run's folder or checkpoint, or the name of a timm model, whose
            pretrained weights are used.
        images: files, folders with images at any depth, or patterns of files, as in ``*.jpg``.
        top: number of classes for each image; at most as many as there are.
        given: what is known about the target, in place of what is stored with it.

    Returns:
        Plain values. ``images`` has for each image its path and its classes, the most likely one
        first, each with its name, its index and its probability from 0 to 1; ``failed`` has the
        path of each image that cannot be read, and why; ``messages`` says what else is in folders.

    Raises:
        ModelError: the target does not exist, cannot be used, or gives NaN or infinite logits.
        CheckpointError: the checkpoint of a run is damaged.
        DataError: there is no image.
    """
    opened = _open(target, given)
    left_out: list[str] = []
    paths = list(_found(images, left_out))
    files = ImageFiles((path, 0) for path in paths)
    names = _readable(opened.class_names, opened.labelled)
    transform = opened.transform()
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for start in range(0, len(paths), BATCH):
        read: list[tuple[str, Tensor]] = []
        for index in range(start, min(start + BATCH, len(paths))):
            try:
                image = files.open(index, opened.preprocessing.mode)
                read.append((paths[index], transform(image)))
            except DataError as error:
                failed.append({"image": paths[index], "why": str(error)})
        if not read:
            continue
        with torch.inference_mode():
            logits = opened.predict(torch.stack([tensor for _, tensor in read]))
        if not logits.isfinite().all():
            raise ModelError(f"{target} gives NaN or infinite logits; give a trained model")
        likely, indices = logits.double().softmax(1).topk(min(top, logits.shape[1]))
        for (path, _), probabilities, classes in zip(
            read, likely.tolist(), indices.tolist(), strict=True
        ):
            pairs = zip(classes, probabilities, strict=True)
            found = [{"class": names[i], "index": i, "probability": p} for i, p in pairs]
            rows.append({"image": path, "classes": found})
    messages = told_unused(left_out)
    return {"target": target, "images": rows, "failed": failed, "messages": messages}


def as_rows(images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Predictions as rows of a CSV file, one for each image.

    Args:
        images: of `predict`.
    """
    rows = []
    for image in images:
        # A file's name may be invalid UTF-8.
        row = {"image": image["image"].encode(errors="backslashreplace").decode()}
        for rank, found in enumerate(image["classes"], start=1):
            row |= {f"class{rank}": found["class"], f"probability{rank}": found["probability"]}
        rows.append(row)
    return rows


def _open(target: str, given: Given) -> Target:
    """A file or run of this path, or else timm's model of this name."""
    if os.path.exists(target):
        return open_target(Path(target), given)
    if os.sep in target or not is_model(architecture(target)):
        raise ModelError(
            f"{target!r} does not exist; give an .onnx file, a run folder, a checkpoint, or a name "
            "of timm"
        )
    loaded = load_model(target)
    model, preprocessing = loaded.model, loaded.preprocessing
    classes = number_of_classes(target, model)
    named = ModelMetadata(preprocessing, [str(i) for i in range(classes)], False)
    known = given.describe(named, Path(target))
    return Target(model, known.preprocessing, known.class_names, known.labelled, None)


def _readable(names: list[str], labelled: bool) -> list[str]:
    """timm's names in place of WordNet's or of numbers without labels, for ImageNet's classes."""
    subset = infer_imagenet_subset({"num_classes": len(names)})
    if subset is None:
        return names
    info = ImageNetInfo(subset)
    if not labelled:
        return [info.index_to_description(i) for i in range(len(names))]
    if not all(_WORDNET.fullmatch(name) for name in names):
        return names
    with suppress(KeyError):  # timm does not know all of WordNet's
        return [info.label_name_to_description(name) for name in names]
    return names


def _found(images: Sequence[str], left_out: list[str]) -> Iterator[str]:
    """The files that were named, in natural order within a folder or a pattern.

    Args:
        images: as typed.
        left_out: receives what else is in folders.
    """
    for name in images:
        if os.path.isdir(name):
            inside = images_below(name, left_out)
            if not inside:
                raise DataError(f"folder {name} has no images ({', '.join(IMAGE_SUFFIXES)})")
            yield from inside
        elif os.path.exists(name):
            yield name
        elif _GLOB.search(name):
            matching = [path for path in glob.glob(name, recursive=True) if os.path.isfile(path)]
            if not matching:
                raise DataError(f"no file matches {name}; give another pattern")
            yield from sorted(matching, key=natural_order)
        else:
            raise DataError(f"image {name!r} does not exist; give a file, a folder or a pattern")
