"""Batches of images whose order and augmentation follow from seed, epoch and index alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ricciq.data.augmentation import Augmentation
from ricciq.data.normalizing import Bytes, Normalizing
from ricciq.data.preprocessing import Preprocessing
from ricciq.data.sources.base import ImageArrays, Images, Indices
from ricciq.errors import DataError, RicciqError, UsageError, on_one_line
from ricciq.system.distributed import World
from ricciq.system.interrupts import heeded

if TYPE_CHECKING:
    from ricciq.data.preprocessing import Transform

Batch = tuple[Tensor, Tensor]
_FORKS = sys.platform == "linux"
"""Whether processes can be forked: elsewhere, libraries of the system may not survive it."""
MOST_WORKERS = 16
LEAST_BATCHES = 8
"""A loader with fewer batches starts no processes by default: that would take longer."""
BATCHES_EACH = 8
"""Batches in shared memory for each worker: two that it prefetches, and those of a step."""
AT_ONCE = 2**16
"""Numbers of an order that become a list at a time."""
NICER = 5
"""What is added to the niceness of workers: the training process gets three times their share."""
SECONDS_TO_CLOSE = 30
"""Time between SIGTERM and SIGKILL, as in torchrun."""


def image_loader(
    images: Images,
    indices: Indices,
    preprocessing: Preprocessing,
    *,
    num_classes: int,
    batch_size: int,
    workers: int | None,
    training: bool,
    seed: int,
    augmentation: Augmentation | None,
    device: torch.device,
    persistent_workers: bool,
    world: World,
) -> DataLoader[Batch]:
    """Batches of chosen images; see `ricciq.data.dataset.ImageData.loader`.

    Args:
        images: all images of a part.
        indices: (N,) the chosen ones.
        preprocessing: size and normalization of the tensors.
        num_classes: number of classes, for targets of mixed images.
        batch_size: images in a batch.
        workers: processes that decode images; 0 decodes in this process, None chooses.
        training: shuffle and augment.
        seed: of the order and the augmentation.
        augmentation: applied in training; None applies none.
        device: where the batches are made.
        persistent_workers: as in torch's DataLoader.
        world: the processes that share the images.

    Returns:
        The loader.

    Raises:
        UsageError: there are fewer images than one batch for each process, auto_augment is
            unknown, or the workers asked for have no shared memory.
    """
    each = batch_size if training else 1
    if world.size > 1 and len(indices) < each * world.size:
        raise UsageError(
            f"{len(indices)} images are fewer than {each} for each of {world.size} processes; "
            "lower --batch-size or start fewer processes"
        )
    if not training:
        indices = indices[world.rank :: world.size]
    applied = augmentation if training and augmentation else Augmentation(no_aug=True)
    mix = applied.mixing(num_classes)
    samples = _Samples(images, indices, preprocessing, applied, seed)
    if workers is None:
        in_memory = isinstance(images, ImageArrays)
        few = in_memory or len(samples) < LEAST_BATCHES * batch_size
        workers = 0 if few else usable_workers(world, samples.bytes_of(batch_size))
    elif workers and (reason := why_not_shared()):
        raise UsageError(
            f"--workers {workers} pass images through shared memory, which cannot be used "
            f"({reason}); give --workers 0, or mount /dev/shm so that it can be written"
        )
    workers = min(workers, os.cpu_count() or 1)
    return _ImageLoader(
        samples,
        Normalizing(preprocessing, mix, device),
        batch_size=batch_size,
        sampler=_EpochSampler(len(samples), seed, batch_size, world) if training else None,
        drop_last=training and len(samples) >= batch_size,
        worker_init_fn=_prepare_worker,
        num_workers=workers,
        persistent_workers=persistent_workers and workers > 0,
        # Where workers are not forked, each would import torch again.
        multiprocessing_context="fork" if workers and _FORKS else None,
        pin_memory=device.type == "cuda",
        collate_fn=_as_is,
        # A generator of its own, so that an epoch draws nothing from the global one.
        generator=torch.Generator().manual_seed(seed),
    )


def usable_workers(world: World, batch_bytes: int) -> int:
    """How many processes decode images by default, where they can be forked.

    Args:
        world: the processes that share the machine's cores and its shared memory.
        batch_bytes: size of a batch; `BATCHES_EACH` of them for each worker must fit into shared
            memory, of which containers may have 64 MB.
    """
    if not _FORKS:  # a script of the user's would be imported in each, and might run again
        return 0
    if why_not_shared():
        return 0
    room = shutil.disk_usage("/dev/shm").free
    fitting = room // (BATCHES_EACH * batch_bytes)
    return min(len(os.sched_getaffinity(0)) // world.size, fitting // world.size, MOST_WORKERS)


def why_not_shared() -> str | None:
    """Why processes cannot share memory; None if they can."""
    try:
        multiprocessing.Lock()
    except (OSError, ImportError) as error:
        return on_one_line(error)
    return None if not _FORKS or os.path.isdir("/dev/shm") else "there is no /dev/shm"


def against_waiting(loader: DataLoader[Batch], world: World) -> str | None:
    """What helps where training waits for images; None if they are in memory already.

    Args:
        loader: from `ImageData.loader`.
        world: the processes that share the machine.
    """
    samples = loader.dataset
    if not isinstance(samples, _Samples) or isinstance(samples.images, ImageArrays):
        return None
    usable = usable_workers(world, samples.bytes_of(loader.batch_size or 1))
    if usable > loader.num_workers:
        return f"give --workers {usable}"
    return "store smaller images, or use more cores and shared memory"


def close(loader: DataLoader[Batch]) -> None:
    """End the persistent workers of a loader.

    Args:
        loader: from `ImageData.loader`.
    """
    loader._iterator = None  # its destructor ends them


def set_epoch(loader: DataLoader[Batch], epoch: int, skip_batches: int = 0) -> None:
    """Set the epoch of a training loader, which decides its order and its augmentation.

    Args:
        loader: from `ImageData.loader` with `training=True`.
        epoch: counted from 0.
        skip_batches: number of batches to skip, to resume in the middle of an epoch.

    Raises:
        TypeError: it is not a training loader.
    """
    samples, sampler = loader.dataset, loader.sampler
    if not (isinstance(samples, _Samples) and isinstance(sampler, _EpochSampler)):
        raise TypeError("set_epoch needs a training loader made by ImageData.loader")
    sampler.epoch = epoch
    sampler.skip = skip_batches


class _Samples(Dataset[Bytes]):
    """The chosen images of a split as bytes, read a batch at a time.

    Random draws depend only on the seed, the epoch, and the index of an image.
    """

    def __init__(
        self,
        images: Images,
        indices: Indices,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        seed: int,
    ) -> None:
        self.images = images
        self.indices = indices
        self.preprocessing = preprocessing
        self.vary = augmentation.transform(preprocessing)
        self.erase = augmentation.erasing() if self.vary else None
        self.mixes = augmentation.mixes
        self.plain = preprocessing.pixel_transform()
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.indices)

    def bytes_of(self, batch_size: int) -> int:
        """Bytes of the images of a batch, and of the masks of random erasing."""
        channels, height, width = self.preprocessing.input_size
        return batch_size * (channels + (self.erase is not None)) * height * width

    def __getitems__(self, positions: list[int]) -> Bytes | DataError:
        """A batch; an error is returned as a value, since torch rewrites errors of workers.

        Args:
            positions: epoch times number of samples, plus the position of the sample. So workers
                that live across epochs learn which one it is.
        """
        self.epoch = positions[0] // len(self)
        chosen = self.indices[np.asarray(positions) % len(self)]
        targets = torch.from_numpy(self.images.targets[chosen])
        try:
            pixels, kept = self._pixels(chosen)
        except DataError as error:
            return error
        mixing_seed = None
        if self.mixes:
            # Of the batch, as that of an image's augmentation is of the image.
            mixing = random.Random(f"mixing {self.seed} {self.epoch} {chosen.tolist()}")
            mixing_seed = mixing.getrandbits(32)
        return Bytes(pixels, targets, kept, mixing_seed)

    def _pixels(self, chosen: Indices) -> tuple[Tensor, Tensor | None]:
        """Pixels (B, C, H, W), and what random erasing keeps of them."""
        if self.vary is not None:
            kept: list[Tensor] = []
            with _random_state_kept():
                varied = [self._varied(self.vary, int(index), kept) for index in chosen]
            return _stacked(varied), torch.stack(kept) if kept else None
        if isinstance(self.images, ImageArrays) and self.images.fits(self.preprocessing):
            # What the transform gives, for the whole batch: a hundred times faster.
            return torch.from_numpy(self.images.pixels[chosen]).permute(0, 3, 1, 2), None
        mode = self.preprocessing.mode
        return _stacked([self.plain(self.images.open(int(i), mode)) for i in chosen]), None

    def _varied(self, vary: Transform, index: int, kept: list[Tensor]) -> Tensor:
        # Seeded by the image, so that neither its batch nor its worker matters. timm's transforms
        # draw from all three generators.
        random.seed(f"augmentation {self.seed} {self.epoch} {index}")
        np.random.seed(random.getrandbits(32))
        torch.default_generator.manual_seed(random.getrandbits(63))
        pixels = vary(self.images.open(index, self.preprocessing.mode))
        if self.erase is not None:
            kept.append(self.erase(torch.ones(1, *pixels.shape[1:], dtype=torch.bool)))
        return pixels


def _stacked(images: list[Tensor]) -> Tensor:
    """A batch of images (C, H, W); in a worker, in shared memory."""
    # PIL has the channels of a pixel side by side. So they are copied, and sorted on the device.
    batch: Tensor = default_collate([image.permute(1, 2, 0) for image in images])
    return batch.permute(0, 3, 1, 2)


class _EpochSampler(Sampler[int]):
    """A process's share of a shuffled order that is a function of seed and epoch alone.

    Processes take batches in turns, so that in a step they see together what a single process
    with their total batch size would see.
    """

    def __init__(self, count: int, seed: int, batch_size: int, world: World) -> None:
        self.count, self.batch_size, self.world = count, batch_size, world
        self.seed = seed
        self.epoch = 0
        self.skip = 0
        """Number of batches of this process to skip at the start."""

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
        order = order[self.skip * self.batch_size :] + self.epoch * self.count
        for some in torch.split(order, AT_ONCE):  # a list of a million numbers takes 40 MB
            yield from some.tolist()


class _ImageLoader(DataLoader[Batch]):
    """A DataLoader that normalizes batches on the device, and raises what its workers return."""

    def __init__(self, samples: _Samples, normalizing: Normalizing, **options: Any) -> None:
        super().__init__(samples, **options)  # type: ignore[arg-type]
        self.normalizing = normalizing

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            yield from self.normalizing.each(self._checked())
        except torch.OutOfMemoryError as error:
            raise RicciqError(
                f"the memory of {self.normalizing.device} is not enough for another batch of "
                f"{self.batch_size} images; lower --batch-size"
            ) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            said = str(error).strip().splitlines()[-1]  # behind the worker's traceback
            raise RicciqError(
                f"a process that decodes images ended ({on_one_line(said, 160)}); give --workers 0"
            ) from error

    def _checked(self) -> Iterator[Bytes]:
        batches: Iterator[Any] = super().__iter__()
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch


def _prepare_worker(worker: int) -> None:  # noqa: ARG001
    """Leave stopping to the parent, and the cores, too, while it needs them.

    Signals reach every process of a group. The parent finishes its step and then closes its loader,
    which ends its workers. An alarm ends a worker that is stuck. There are as many workers as
    cores, and a GPU waits for the process that queues its work.
    """
    with suppress(AttributeError, OSError):  # not on every system, nor in every sandbox
        os.nice(NICER)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in set(heeded()) - {signal.SIGINT}:
        signal.signal(number, lambda *_: signal.alarm(SECONDS_TO_CLOSE))


def _as_is(batch: Any) -> Any:
    return batch


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the global random generators after a block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
