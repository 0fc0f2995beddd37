"""The end of loading, on the device of the model: bytes become numbers, are erased and mixed.

Batches travel as bytes, which are a quarter of the numbers, to this process and to the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from timm.data.mixup import Mixup, one_hot
from torch import Tensor

from ricciq.data.preprocessing import Preprocessing

PIECE = 2**18
"""Numbers that a CPU normalizes at a time, so that they stay in its cache."""
ALIGNMENT = 64
"""Of torch's tensors, in bytes. Sums of some libraries depend on it in their last bits."""


class Bytes(NamedTuple):
    """A batch before it is normalized.

    Attributes:
        pixels: (B, C, H, W) uint8.
        targets: (B,) int64.
        kept: (B, 1, H, W) bool, False where random erasing erases; None without it.
        mixing_seed: of Mixup and CutMix; None without them.
    """

    pixels: Tensor
    targets: Tensor
    kept: Tensor | None = None
    mixing_seed: int | None = None


class Normalizing:
    """Makes the batches that a model takes, on its device.

    Args:
        preprocessing: mean and standard deviation.
        mix: timm's Mixup and CutMix; None for neither.
        device: where the batches are made.
    """

    def __init__(
        self, preprocessing: Preprocessing, mix: Mixup | None, device: torch.device
    ) -> None:
        self.mix, self.device = mix, device
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
            for values in (preprocessing.mean, preprocessing.std)
        )
        # A GPU would multiply by the reciprocal of a plain number, and round differently.
        self.largest = torch.full((1,), 255, dtype=torch.float32, device=device)

    def __call__(self, batch: Bytes) -> tuple[Tensor, Tensor]:
        """Normalize, erase and mix.

        The numbers are those of ToTensor, Normalize and timm's RandomErasing and Mixup, to the bit.

        Args:
            batch: from the process that decodes it.

        Returns:
            Images (B, C, H, W) float32, and targets: (B,) int64, or with mixing (B, classes)
            float32.
        """
        pixels = batch.pixels.to(self.device, non_blocking=True)
        targets = batch.targets.to(self.device, non_blocking=True)
        if self.device.type == "cpu":
            images = _in_huge_pages(pixels.shape)
            at_once = max(PIECE // images[0].numel(), 1)
        else:
            images = torch.empty(pixels.shape, device=self.device, dtype=torch.float32)
            at_once = len(images)
        for part, of_pixels in zip(
            torch.split(images, at_once), torch.split(pixels, at_once), strict=True
        ):
            part.copy_(of_pixels).div_(self.largest).sub_(self.mean).div_(self.std)
        if batch.kept is not None:
            images.masked_fill_(~batch.kept.to(self.device, non_blocking=True), 0)
        if self.mix is None or batch.mixing_seed is None:
            return images, targets
        with _numpy_seeded(batch.mixing_seed):
            return _mixed(self.mix, images, targets)

    def each(self, batches: Iterable[Bytes]) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalize all batches of an epoch.

        On a GPU, the next batch is copied and normalized while the caller works on the one that it
        got. The caller must work on the stream that is current when it asks for a batch.

        Args:
            batches: from the processes that decode them, in pinned memory for a GPU.

        Yields:
            Batches as `__call__` returns them.
        """
        if self.device.type != "cuda":
            yield from map(self, batches)
            return
        beside = _stream_beside(self.device)
        ready: tuple[Tensor, Tensor] | None = None
        for batch in batches:
            # Memory of batches that the caller is done with is used again, so what it has queued
            # comes first. What it queues from now on runs beside this.
            beside.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(beside):
                following = self(batch)
            if ready is not None:
                yield ready
            torch.cuda.current_stream(self.device).wait_stream(beside)
            ready = following
        if ready is not None:
            yield ready


def _in_huge_pages(shape: torch.Size) -> Tensor:
    """An empty float32 tensor, aligned as torch's own.

    Filling 38 MB of new memory in small pages takes longer than normalizing them. NumPy asks for
    huge pages, torch does not.
    """
    count = shape.numel()
    room = np.empty(count + ALIGNMENT // 4, np.float32)
    start = -room.ctypes.data % ALIGNMENT // 4
    return torch.from_numpy(room[start : start + count]).view(shape)


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """One for the process: memory is only used again on the stream that it was allocated on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _mixed(mix: Mixup, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each image with the one at the mirrored position, and return images and class shares.

    timm takes only batches of even size. In a batch of odd size the last image is left unmixed.
    """
    even = len(targets) // 2 * 2
    shares: Tensor = one_hot(targets, mix.num_classes)  # type: ignore[no-untyped-call]
    if even:
        images[:even], shares[:even] = mix(images[:even], targets[:even])
    return images, shares


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, which Mixup draws from, and restore it after the block."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
