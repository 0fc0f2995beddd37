"""Labelled pictures that can be opened one by one: files, opened strictly, or arrays in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from ricciq.errors import DataError
from ricciq.preprocessing import Preprocessing

Indices = npt.NDArray[np.int64]
GREY_PROBES = 32


class Pictures(Protocol):
    """Pictures that can be opened one by one, with targets known beforehand."""

    targets: Indices

    def open(self, index: int, mode: str) -> Image.Image:
        """The picture of an index in PIL mode "L" or "RGB"."""


class PictureFiles:
    """Pictures in files.

    Attributes:
        paths: one file a picture.
        targets: (N,) class indices.
    """

    def __init__(self, paths: Sequence[str], targets: Sequence[int]) -> None:
        self.paths = paths
        self.targets: Indices = np.asarray(targets, dtype=np.int64)

    def open(self, index: int, mode: str) -> Image.Image:
        """Decode the file of an index in full.

        Raises:
            DataError: the file is missing, damaged, or so large that PIL suspects an attack.
        """
        with _opened(self.paths[index]) as picture:
            if picture.mode.startswith("I"):
                # PIL would clip 16-bit grey at 255, which turns most of it white.
                high = np.clip(np.asarray(picture), 0, 65535) >> 8
                return Image.fromarray(high.astype(np.uint8)).convert(mode)
            return picture.convert(mode)

    def grey(self) -> bool:
        """Whether an evenly spaced sample of the files holds grey pictures only."""
        count = len(self.paths)
        for index in set(np.linspace(0, count - 1, GREY_PROBES).astype(int)):
            with _opened(self.paths[index]) as picture:
                if picture.getbands()[0] not in {"1", "L", "I", "F"}:
                    return False
        return True


class PictureArrays:
    """Pictures in memory.

    Attributes:
        pixels: (N, H, W, C) bytes, C being 1 or 3.
        targets: (N,) class indices.
    """

    def __init__(self, pixels: npt.NDArray[np.uint8], targets: Sequence[int]) -> None:
        self.pixels = pixels
        self.targets: Indices = np.asarray(targets, dtype=np.int64)

    def open(self, index: int, mode: str) -> Image.Image:
        """The picture of an index."""
        pixels = self.pixels[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert(mode)

    def fits(self, preprocessing: Preprocessing) -> bool:
        """Whether evaluation leaves the pixels as they are, but for the normalization."""
        channels, height, width = preprocessing.input_size
        return self.pixels.shape[1:] == (height, width, channels) and preprocessing.crop_pct == 1.0


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """An open picture; whatever goes wrong with it is a DataError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                yield picture
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
        raise DataError(f"picture {path} cannot be read ({reason}): repair or remove it") from error
