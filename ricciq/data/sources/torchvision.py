"""The form torch/NAME: torchvision's data sets, as timm names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from timm.data.dataset_factory import create_dataset

from ricciq.data.sources.base import ImageArrays, Images, Parts
from ricciq.data.sources.files import ImageFiles
from ricciq.errors import DataError

# timm's names and torchvision's. The first kind keeps images in memory, the second in files.
IN_MEMORY = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "mnist": "MNIST",
    "qmnist": "QMNIST",
}
IN_FILES = {"image_folder": "ImageFolder", "imagenet": "ImageNet", "places365": "Places365"}
NAMES = IN_MEMORY | IN_FILES


def open_source(name: str, root: Path | None) -> Parts:
    """Open a torchvision data set; nothing is downloaded.

    Args:
        name: torch/NAME.
        root: folder of its files.

    Returns:
        The class names and both parts.

    Raises:
        DataError: timm does not know the data set, or its files are missing or damaged.
    """
    name = name.removeprefix("torch/")
    if name in ("inat", "inaturalist"):
        raise DataError(
            f"data 'torch/{name}' has seven labels for each image, not one; arrange the images as "
            "a folder with train/ and val/, one folder for each class"
        )
    if name not in NAMES:
        raise DataError(
            f"there is no data set 'torch/{name}'; give one of "
            + ", ".join(f"torch/{known}" for known in NAMES)
        )
    try:
        train, val = (
            create_dataset(f"torch/{name}", root=str(root), split=split, download=False)
            for split in ("train", "validation")
        )
    except Exception as error:  # torchvision raises whatever its parsers meet
        download = "" if name in ("image_folder", "imagenet") else ", download=True"
        raise DataError(
            f"torch/{name} is missing or damaged in {root}; give --data-dir a folder that "
            f"torchvision.datasets.{NAMES[name]}(folder{download}) has filled"
        ) from error
    if name in IN_MEMORY:
        return Parts(list(train.classes), _arrays(train), _arrays(val))
    # If a split is missing, timm uses the root itself.
    if (name == "image_folder" and train.root == val.root) or train.classes != val.classes:
        raise DataError(
            f"torch/{name} needs train/ and validation/ in {root} with the same classes in both; "
            "give --data-dir such a folder"
        )
    # ImageNet's classes are tuples of synonyms, some in two classes; its folders name each once.
    names = getattr(train, "wnids", train.classes)
    return Parts(list(names), _files(train), _files(val))


def _arrays(part: Any) -> Images:
    pixels, targets = np.asarray(part.data), np.asarray(part.targets)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    # In QMNIST the other columns say where the digit comes from.
    return ImageArrays(pixels, targets if targets.ndim == 1 else targets[:, 0])


def _files(part: Any) -> Images:
    return ImageFiles(part.imgs)
