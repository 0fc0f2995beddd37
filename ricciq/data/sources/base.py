"""Labelled images with random access: encoded ones, which are opened strictly, or arrays."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import DataError

Indices = npt.NDArray[np.int64]
GREY_PROBES = 32
"""How many images are opened to find out whether all are grey."""
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
"""Extensions of image files, by PIL's name of the format.

Formats that PIL runs as a program, such as PostScript, or that no data set uses, are left out.
"""
IMAGE_SUFFIXES = tuple(suffix for suffixes in EXTENSIONS.values() for suffix in suffixes)


class Images(Protocol):
    """Images with random access.

    Attributes:
        targets: (N,) class indices.
    """

    targets: Indices

    def open(self, index: int, mode: str) -> Image.Image:
        """Open an image.

        Args:
            index: of the image, from 0.
            mode: PIL mode to convert it to, "L" or "RGB".

        Raises:
            DataError: it cannot be read.
        """

    def grey(self) -> bool:
        """Whether the images have one channel."""


class Parts(NamedTuple):
    """What a form of --data opens.

    Attributes:
        class_names: one name for each class, in the order of the targets; empty without labels.
        train: the training images; None if they were not asked for.
        val: the validation images.
        messages: sentences for the user, such as about files that are not used.
    """

    class_names: list[str]
    train: Images | None
    val: Images
    messages: Sequence[str] = ()


class EncodedImages(ABC):
    """Images that are decoded when they are opened; a subclass knows where they are stored.

    Attributes:
        targets: (N,) class indices.
    """

    def __init__(self, targets: Sequence[int] | Indices) -> None:
        self.targets: Indices = np.asarray(targets, dtype=np.int64)

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of an image in an error message."""

    @abstractmethod
    def source(self, index: int) -> str | BinaryIO:
        """The path of an image, or a stream of its bytes."""

    def open(self, index: int, mode: str) -> Image.Image:
        """Decode an image in full.

        Args:
            index: of the image, from 0.
            mode: PIL mode to convert it to, "L" or "RGB".

        Raises:
            DataError: it is missing, damaged, or so large that PIL suspects an attack.
        """
        with self._opened(index) as image:
            if image.mode.startswith("I"):
                # PIL would clip 16-bit grey at 255, so that most of it became white.
                high = np.clip(np.asarray(image), 0, 65535) >> 8
                return Image.fromarray(high.astype(np.uint8)).convert(mode)
            image.load()
            return image if image.mode == mode else image.convert(mode)  # PIL would copy it

    def grey(self) -> bool:
        """Whether all images of an evenly spaced sample are grey."""
        count = len(self.targets)
        for index in set(np.linspace(0, count - 1, GREY_PROBES).astype(int)):
            with self._opened(int(index)) as image:
                if image.getbands()[0] not in {"1", "L", "I", "F"}:
                    return False
        return True

    @contextmanager
    def _opened(self, index: int) -> Iterator[Image.Image]:
        """An open image; any error in the block becomes a DataError that names the image."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(self.source(index), formats=[*EXTENSIONS]) as image:
                    yield image
        except Exception as error:  # on damaged files decoders raise nearly anything
            reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
            if isinstance(error, UnidentifiedImageError):  # its message shows a BytesIO's address
                reason = "unknown image format"
            raise self.unreadable(index, reason) from error

    def unreadable(self, index: int, reason: str) -> DataError:
        """The error about an image that cannot be read.

        Args:
            index: of the image, from 0.
            reason: why.
        """
        return DataError(f"image {self.name(index)} cannot be read ({reason}); repair or remove it")


class ImageArrays:
    """Images in memory.

    Attributes:
        pixels: (N, H, W, C) bytes, C being 1 or 3.
        targets: (N,) class indices.
    """

    def __init__(self, pixels: npt.NDArray[np.uint8], targets: Sequence[int] | Indices) -> None:
        self.pixels = pixels
        self.targets: Indices = np.asarray(targets, dtype=np.int64)

    def open(self, index: int, mode: str) -> Image.Image:
        """Convert an array to an image.

        Args:
            index: of the image, from 0.
            mode: PIL mode to convert it to, "L" or "RGB".
        """
        pixels = self.pixels[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert(mode)

    def grey(self) -> bool:
        """Whether the images have one channel."""
        return bool(self.pixels.shape[-1] == 1)

    def fits(self, preprocessing: Preprocessing) -> bool:
        """Whether evaluation only normalizes the pixels, without resizing or cropping."""
        channels, height, width = preprocessing.input_size
        return self.pixels.shape[1:] == (height, width, channels) and preprocessing.crop_pct == 1.0
