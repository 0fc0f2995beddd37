"""A data folder of many images that takes hardly any space: hard links to one for each class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image


def make_folder(root: Path, classes: int, training: int, validation: int, side: int = 32) -> None:
    """Make train/ and val/ with names as ImageNet's.

    Args:
        root: the folder.
        classes: number of classes; each has an image of its own.
        training: number of training images.
        validation: number of validation images.
        side: height and width of the images in pixels.
    """
    for number in range(classes):
        name = f"n{number:08}"
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        image = None
        for split, count in (("train", training), ("val", validation)):
            (root / split / name).mkdir(parents=True)
            for index in range(number, count, classes):
                path = f"{root}/{split}/{name}/{name}_{index}.JPEG"
                if image is None:
                    Image.fromarray(pixels).save(path)
                    image = path
                else:
                    os.link(image, path)
