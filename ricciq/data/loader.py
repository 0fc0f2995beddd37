"""Batches of images whose order and augmentation follow from seed, epoch and index alone."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import sys
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
from ricciq.data.sources.base import ImageArrays, Images, Indices
from ricciq.errors import DataError, RicciqError, UsageError, on_one_line
from ricciq.system.distributed import World

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
    pin_memory: bool,
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
        pin_memory: as in torch's DataLoader.
        persistent_workers: as in torch's DataLoader.
        world: the processes that share the images.

    Returns:
        The loader.

    Raises:
        UsageError: there are fewer images than one batch for each process, or auto_augment is
            unknown.
    """
    each = batch_size if training else 1
    if world.size > 1 and len(indices) < each * world.size:
        raise UsageError(
            f"{len(indices)} images are fewer than {each} for each of {world.size} processes; "
            "lower --batch-size or start fewer processes"
        )
    if not training:
        indices = indices[world.rank :: world.size]
    vary = mix = None
    if training and augmentation:
        vary, mix = augmentation.transform(preprocessing), augmentation.mixing(num_classes)
    samples = _Samples(images, indices, preprocessing, vary, mix, seed)
    if workers is None:
        in_memory = isinstance(images, ImageArrays)
        few = in_memory or len(samples) < LEAST_BATCHES * batch_size
        workers = 0 if few else usable_workers(world, samples.bytes_of(batch_size))
    workers = min(workers, os.cpu_count() or 1)
    return _ImageLoader(
        samples,
        batch_size=batch_size,
        sampler=_EpochSampler(len(samples), seed, batch_size, world) if training else None,
        drop_last=training and len(samples) >= batch_size,
        worker_init_fn=_leave_stopping_to_the_parent,
        num_workers=workers,
        persistent_workers=persistent_workers and workers > 0,
        # Where workers are not forked, each would import torch again.
        multiprocessing_context="fork" if workers and _FORKS else None,
        pin_memory=pin_memory,
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
    try:
        room = shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0
    fitting = room // (BATCHES_EACH * batch_bytes)
    return min(len(os.sched_getaffinity(0)) // world.size, fitting // world.size, MOST_WORKERS)


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


class _Samples(Dataset[Batch]):
    """The chosen images of a split as normalized tensors, read a batch at a time.

    Random draws depend only on the seed, the epoch, and the index of an image.
    """

    def __init__(
        self,
        images: Images,
        indices: Indices,
        preprocessing: Preprocessing,
        vary: Transform | None,
        mix: Mixup | None,
        seed: int,
    ) -> None:
        self.images = images
        self.indices = indices
        self.preprocessing = preprocessing
        self.vary = vary
        self.mix = mix
        self.evaluate = preprocessing.evaluation_transform()
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.indices)

    def bytes_of(self, batch_size: int) -> int:
        """Bytes of the images of a batch."""
        return 4 * batch_size * math.prod(self.preprocessing.input_size)

    def __getitems__(self, positions: list[int]) -> Batch | DataError:
        """A batch; an error is returned as a value, since torch rewrites errors of workers.

        Args:
            positions: epoch times number of samples, plus the position of the sample. So workers
                that live across epochs learn which one it is.
        """
        self.epoch = positions[0] // len(self)
        chosen = self.indices[np.asarray(positions) % len(self)]
        targets = torch.from_numpy(self.images.targets[chosen])
        try:
            inputs = self._inputs(chosen)
        except DataError as error:
            return error
        if self.mix is None:
            return inputs, targets
        with _random_state_kept():
            # Seeded by the batch, as an image's augmentation is by the image.
            random.seed(f"mixing {self.seed} {self.epoch} {chosen.tolist()}")
            np.random.seed(random.getrandbits(32))
            return _mixed(self.mix, inputs, targets)

    def _inputs(self, chosen: Indices) -> Tensor:
        if self.vary is not None:
            with _random_state_kept():
                return torch.stack([self._varied(self.vary, int(index)) for index in chosen])
        if isinstance(self.images, ImageArrays) and self.images.fits(self.preprocessing):
            # The same arithmetic as the transform, on the whole batch: a hundred times faster.
            pixels = torch.from_numpy(self.images.pixels[chosen]).permute(0, 3, 1, 2)
            inputs = pixels.contiguous().to(torch.float32).div_(255)
            mean, std = list(self.preprocessing.mean), list(self.preprocessing.std)
            normalize(inputs, mean, std, inplace=True)
            return inputs
        mode = self.preprocessing.mode
        return torch.stack([self.evaluate(self.images.open(int(i), mode)) for i in chosen])

    def _varied(self, vary: Transform, index: int) -> Tensor:
        # Seeded by the image, so that neither its batch nor its worker matters. timm's transforms
        # draw from all three generators.
        random.seed(f"augmentation {self.seed} {self.epoch} {index}")
        np.random.seed(random.getrandbits(32))
        torch.default_generator.manual_seed(random.getrandbits(63))
        return vary(self.images.open(index, self.preprocessing.mode))


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
        yield from (order[self.skip * self.batch_size :] + self.epoch * self.count).tolist()


class _ImageLoader(DataLoader[Batch]):
    """A DataLoader that raises the errors that its workers return."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            for batch in super().__iter__():
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RicciqError(
                f"a process that decodes images ended ({on_one_line(error, 160)}); give --workers 0"
            ) from error


def _leave_stopping_to_the_parent(worker: int) -> None:  # noqa: ARG001
    """Ignore signals in a worker, since they reach every process of a group.

    The parent finishes its step and then closes its loader, which ends its workers. An alarm ends a
    worker that is stuck.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_TO_CLOSE))


def _mixed(mix: Mixup, images: Tensor, targets: Tensor) -> Batch:
    """Mix each image with the one at the mirrored position, and return images and class shares.

    timm takes only batches of even size. In a batch of odd size the last image is left unmixed.
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
    """Restore the global random generators after a block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
