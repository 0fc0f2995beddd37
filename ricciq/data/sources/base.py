"""Labelled pictures that can be opened one by one: encoded ones, strictly, or arrays in memory."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from timm.utils.misc import natural_key

from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import DataError

Indices = npt.NDArray[np.int64]
GREY_PROBES = 32
EXTENSIONS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
}
"""Of files that hold images, by PIL's name of the format.

Other formats are programs that PIL has run, as PostScript, or what no data set is made of.
"""
IMAGE_SUFFIXES = tuple(suffix for suffixes in EXTENSIONS.values() for suffix in suffixes)


def natural_order(name: str) -> tuple[list[str | int], str]:
    """A key to sort as timm does, 9 before 10; the name itself parts what that leaves equal."""
    return natural_key(name), name  # type: ignore[no-untyped-call]


class Pictures(Protocol):
    """Pictures that can be opened one by one, with targets known beforehand."""

    targets: Indices

    def open(self, index: int, mode: str) -> Image.Image:
        """The picture of an index in PIL mode "L" or "RGB"."""

    def grey(self) -> bool:
        """Whether the pictures have one channel."""


class Parts(NamedTuple):
    """What a form of --data holds.

    Attributes:
        class_names: one name a class, in the order of the targets; none where there are no labels.
        train: the training pictures.
        val: the validation pictures.
    """

    class_names: list[str]
    train: Pictures
    val: Pictures


class EncodedPictures(ABC):
    """Pictures that are decoded when they are asked for; a subclass knows where they lie.

    Attributes:
        targets: (N,) class indices.
    """

    def __init__(self, targets: Sequence[int] | Indices) -> None:
        self.targets: Indices = np.asarray(targets, dtype=np.int64)

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call a picture in a message."""

    @abstractmethod
    def source(self, index: int) -> str | BinaryIO:
        """The file of a picture, or its content."""

    def open(self, index: int, mode: str) -> Image.Image:
        """Decode the picture of an index in full.

        Raises:
            DataError: it is missing, damaged, or so large that PIL suspects an attack.
        """
        with self._opened(index) as picture:
            if picture.mode.startswith("I"):
                # PIL would clip 16-bit grey at 255, which turns most of it white.
                high = np.clip(np.asarray(picture), 0, 65535) >> 8
                return Image.fromarray(high.astype(np.uint8)).convert(mode)
            return picture.convert(mode)

    def grey(self) -> bool:
        """Whether an evenly spaced sample of the pictures is grey throughout."""
        count = len(self.targets)
        for index in set(np.linspace(0, count - 1, GREY_PROBES).astype(int)):
            with self._opened(int(index)) as picture:
                if picture.getbands()[0] not in {"1", "L", "I", "F"}:
                    return False
        return True

    @contextmanager
    def _opened(self, index: int) -> Iterator[Image.Image]:
        """An open picture; whatever goes wrong with it is a DataError that names it."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(self.source(index), formats=[*EXTENSIONS]) as picture:
                    yield picture
        except Exception as error:  # decoders raise nearly anything on damaged files
            reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
            if isinstance(error, UnidentifiedImageError):  # its own words show a BytesIO's address
                reason = "no kind of picture that is known"
            raise DataError(
                f"picture {self.name(index)} cannot be read ({reason}): repair or remove it"
            ) from error


class PictureFiles(EncodedPictures):
    """Pictures in files.

    Attributes:
        paths: one file a picture.
    """

    def __init__(self, paths: Sequence[str], targets: Sequence[int]) -> None:
        super().__init__(targets)
        self.paths = paths

    def name(self, index: int) -> str:
        """The path."""
        return self.paths[index]

    def source(self, index: int) -> str:
        """The path.

        Raises:
            OSError: it is that of a pipe or a device, which might never end.
        """
        path = self.paths[index]
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is no file")
        return path


class PictureArrays:
    """Pictures in memory.

    Attributes:
        pixels: (N, H, W, C) bytes, C being 1 or 3.
        targets: (N,) class indices.
    """

    def __init__(self, pixels: npt.NDArray[np.uint8], targets: Sequence[int] | Indices) -> None:
        self.pixels = pixels
        self.targets: Indices = np.asarray(targets, dtype=np.int64)

    def open(self, index: int, mode: str) -> Image.Image:
        """The picture of an index."""
        pixels = self.pixels[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert(mode)

    def grey(self) -> bool:
        """Whether the pictures have one channel."""
        return bool(self.pixels.shape[-1] == 1)

    def fits(self, preprocessing: Preprocessing) -> bool:
        """Whether evaluation leaves the pixels as they are, but for the normalization."""
        channels, height, width = preprocessing.input_size
        return self.pixels.shape[1:] == (height, width, channels) and preprocessing.crop_pct == 1.0
