"""Batches of pictures whose order and augmentation follow from seed, epoch and index alone."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.data.mixup import Mixup, one_hot
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.functional import normalize

from ricciq.data.augmentation import Augmentation
from ricciq.data.preprocessing import Preprocessing
from ricciq.data.sources.base import Indices, PictureArrays, Pictures
from ricciq.errors import DataError, UsageError
from ricciq.system.distributed import World

if TYPE_CHECKING:
    from ricciq.data.preprocessing import Transform

Batch = tuple[Tensor, Tensor]
SECONDS_TO_CLOSE = 30
"""What torchrun too leaves a process between SIGTERM and SIGKILL."""


def picture_loader(
    pictures: Pictures,
    indices: Indices,
    preprocessing: Preprocessing,
    *,
    num_classes: int,
    batch_size: int,
    workers: int,
    training: bool,
    seed: int,
    augmentation: Augmentation | None,
    pin_memory: bool,
    world: World,
) -> DataLoader[Batch]:
    """The chosen pictures in batches; see `ricciq.data.dataset.PictureData.loader`."""
    each = batch_size if training else 1
    if world.size > 1 and len(indices) < each * world.size:
        raise UsageError(
            f"{len(indices)} pictures are not {each} for each of {world.size} processes; lower "
            "--batch-size or start fewer"
        )
    if not training:
        indices = indices[world.rank :: world.size]
    vary = mix = None
    if training and augmentation:
        vary, mix = augmentation.transform(preprocessing), augmentation.mixing(num_classes)
    samples = _Samples(pictures, indices, preprocessing, vary, mix, seed)
    return _PictureLoader(
        samples,
        batch_size=batch_size,
        sampler=_EpochSampler(len(samples), seed, batch_size, world) if training else None,
        drop_last=training and len(samples) >= batch_size,
        worker_init_fn=_leave_stopping_to_the_parent,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_as_is,
        # Its own, so that starting an epoch draws nothing from the global generator.
        generator=torch.Generator().manual_seed(seed),
    )


def set_epoch(loader: DataLoader[Batch], epoch: int, skip_batches: int = 0) -> None:
    """Give a training loader the order and the augmentation of an epoch.

    Args:
        loader: from `PictureData.loader` with `training=True`.
        epoch: counted from 0.
        skip_batches: leave out this many first batches, to go on in the middle of an epoch.
    """
    samples, sampler = loader.dataset, loader.sampler
    if not (isinstance(samples, _Samples) and isinstance(sampler, _EpochSampler)):
        raise TypeError("set_epoch needs a training loader made by PictureData.loader")
    samples.epoch = sampler.epoch = epoch
    sampler.skip = skip_batches


class _Samples(Dataset[Batch]):
    """The chosen pictures of a split as normalized tensors, read a batch at a time."""

    def __init__(
        self,
        pictures: Pictures,
        indices: Indices,
        preprocessing: Preprocessing,
        vary: Transform | None,
        mix: Mixup | None,
        seed: int,
    ) -> None:
        self.pictures = pictures
        self.indices = indices
        self.preprocessing = preprocessing
        self.vary = vary
        self.mix = mix
        self.evaluate = preprocessing.evaluation_transform()
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: list[int]) -> Batch | DataError:
        """A batch; an error is handed over as a value, since torch rewrites what workers raise."""
        chosen = self.indices[positions]
        targets = torch.from_numpy(self.pictures.targets[chosen])
        try:
            images = self._images(chosen)
        except DataError as error:
            return error
        if self.mix is None:
            return images, targets
        with _random_state_kept():
            # Of the batch's own, as a picture's augmentation is of its own.
            random.seed(f"mixing {self.seed} {self.epoch} {chosen.tolist()}")
            np.random.seed(random.getrandbits(32))
            return _mixed(self.mix, images, targets)

    def _images(self, chosen: Indices) -> Tensor:
        if self.vary is not None:
            with _random_state_kept():
                return torch.stack([self._varied(self.vary, int(index)) for index in chosen])
        if isinstance(self.pictures, PictureArrays) and self.pictures.fits(self.preprocessing):
            # The arithmetic of the transform, on the whole batch: a hundred times faster.
            pixels = torch.from_numpy(self.pictures.pixels[chosen]).permute(0, 3, 1, 2)
            images = pixels.contiguous().to(torch.float32).div_(255)
            mean, std = list(self.preprocessing.mean), list(self.preprocessing.std)
            normalize(images, mean, std, inplace=True)
            return images
        mode = self.preprocessing.mode
        return torch.stack([self.evaluate(self.pictures.open(int(i), mode)) for i in chosen])

    def _varied(self, vary: Transform, index: int) -> Tensor:
        # Of a picture's own, so that neither its batch nor its worker matters. timm's transforms
        # draw from all three generators.
        random.seed(f"augmentation {self.seed} {self.epoch} {index}")
        np.random.seed(random.getrandbits(32))
        torch.default_generator.manual_seed(random.getrandbits(63))
        return vary(self.pictures.open(index, self.preprocessing.mode))


class _EpochSampler(Sampler[int]):
    """A process's share of a shuffled order that is a function of seed and epoch alone.

    Batches of all processes are dealt by turns, so that together they see in a step what one
    process with as many times the batch size would.
    """

    def __init__(self, count: int, seed: int, batch_size: int, world: World) -> None:
        self.count, self.batch_size, self.world = count, batch_size, world
        self.seed = seed
        self.epoch = 0
        self.skip = 0
        """Batches of this process left out at the start."""

    def __len__(self) -> int:
        together = self.batch_size * self.world.size
        share = self.count if self.world.size == 1 else self.count // together * self.batch_size
        return max(share - self.skip * self.batch_size, 0)

    def __iter__(self) -> Iterator[int]:
        start = random.Random(f"order {self.seed} {self.epoch}").getrandbits(63)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(start))
        if self.world.size > 1:
            together = self.batch_size * self.world.size
            whole = order[: self.count // together * together]
            order = whole.view(-1, self.world.size, self.batch_size)[:, self.world.rank].flatten()
        yield from order[self.skip * self.batch_size :].tolist()


class _PictureLoader(DataLoader[Batch]):
    """A DataLoader that raises the errors its workers hand over."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch


def _leave_stopping_to_the_parent(worker: int) -> None:  # noqa: ARG001
    """Signals may reach every process of a group; the parent finishes its step first.

    It then closes its loader, which ends its workers; one that is stuck ends by the alarm.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_TO_CLOSE))


def _mixed(mix: Mixup, images: Tensor, targets: Tensor) -> Batch:
    """Pictures blended with their counterparts from the batch's other end, and the classes' shares.

    timm takes even batches only. Of an odd one the last picture stays as it is, as the middle one,
    which is its own counterpart, would.
    """
    even = len(targets) // 2 * 2
    shares: Tensor = one_hot(targets, mix.num_classes)  # type: ignore[no-untyped-call]
    if even:
        images[:even], shares[:even] = mix(images[:even], targets[:even])
    return images, shares


def _as_is(batch: Any) -> Any:
    return batch


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Put the global random generators back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
