"""A classification data set, with its splits: fit, holdout and val."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ricciq.data.augmentation import Augmentation
from ricciq.data.classes import printable_name
from ricciq.data.loader import Batch, image_loader
from ricciq.data.preprocessing import Preprocessing
from ricciq.data.sources.base import Images, Indices
from ricciq.data.sources.files import ImageFiles
from ricciq.errors import DataError, UsageError
from ricciq.system.distributed import World

Split = Literal["fit", "holdout", "val"]
HOLDOUT_SHARE = 0.05


class ImageData:
    """A classification data set with training and validation images.

    Some of the training images are held out, the same ones in every run. The best epoch is chosen
    on them, so that the validation images are used only once.

    Attributes:
        name: the value of --data.
        class_names: one name for each class, in the order of the targets.
        grey: whether the images have one channel.
        labelled: whether targets are known; if not, `set_pseudo_labels` provides them.
        messages: for the user, such as about files that are not used.
    """

    def __init__(
        self, name: str, class_names: Sequence[str], grey: bool, train: Images | None, val: Images
    ) -> None:
        """Hold out the default share of the training images.

        Args:
            name: the value of --data.
            class_names: one name for each class; empty if there are no labels.
            grey: whether the images have one channel.
            train: the training images; None to evaluate only.
            val: the validation images.

        Raises:
            DataError: as `hold_out`.
        """
        self.name = name
        self.class_names = [printable_name(name) for name in class_names]
        self.grey = grey
        self.labelled = bool(class_names)
        self.messages: list[str] = []
        self._train, self._val = train, val
        self._splits: dict[Split, tuple[Images, Indices]] = {"val": (val, _all_of(val))}
        if train is not None:
            self.hold_out(HOLDOUT_SHARE)

    def hold_out(self, share: float) -> None:
        """Hold out a share of the training images; a larger share includes a smaller one.

        Args:
            share: 0 to 1, of the training images.

        Raises:
            DataError: there is only one training image.
        """
        train = self._train
        assert train is not None, "without training images, nothing can be held out"
        if len(train.targets) < 2:
            raise DataError(
                f"data {self.name!r} has a single training image; give at least two, one to "
                "train on and one to hold out"
            )
        # A class with one image keeps it for training, unless no class has two.
        counts = np.bincount(train.targets)
        spare = np.flatnonzero(counts[train.targets] > 1)
        pool = spare if len(spare) else np.arange(len(train.targets))
        wanted = max(round(share * len(pool)), int((counts > 1).sum()), 1)
        held_out = _stratified(train.targets, pool, wanted)
        is_fit = np.ones(len(train.targets), dtype=bool)
        is_fit[held_out] = False
        self._splits["fit"] = train, np.flatnonzero(is_fit)
        self._splits["holdout"] = train, held_out

    def set_pseudo_labels(self, num_classes: int, predictions: Mapping[Split, Indices]) -> None:
        """Use a model's predictions as pseudo-labels.

        Args:
            num_classes: of the model; the class names become 0, 1 and so on.
            predictions: (N,) class of every image, by split; targets of other splits become -1.
        """
        self.class_names = [str(number) for number in range(num_classes)]
        for split, (images, indices) in self._splits.items():
            images.targets[indices] = predictions.get(split, -1)

    def use_outputs(self, names: Sequence[str], source: str) -> None:
        """Number the classes as the outputs of a network, which are found by their names.

        Args:
            names: of the outputs, in their order; there may be more than the classes of the data.
            source: where the names come from, for the error.

        Raises:
            DataError: a class of the data is not among them, or there twice.
        """
        if names == self.class_names:
            return
        number = {name: index for index, name in enumerate(names)}
        times = Counter(names)
        if twice := [name for name in self.class_names if times[name] > 1]:
            raise DataError(
                f"{source} has the class {twice[0]!r} of data {self.name!r} twice; give a class "
                "map in which each name is there once"
            )
        if missing := [name for name in self.class_names if name not in number]:
            raise DataError(
                f"data {self.name!r} has the class {missing[0]!r}, which {source} does not have; "
                "correct the name, or give data or a class map with the same names"
            )
        numbers = np.array([number[name] for name in self.class_names], dtype=np.int64)
        for images in filter(None, (self._train, self._val)):
            images.targets = numbers[images.targets]
        self.class_names = list(names)

    def check_training_images(self) -> None:
        """Look for training images that cannot be read, as far as this needs no decoding.

        Raises:
            DataError: there is one.
        """
        if isinstance(self._train, ImageFiles):
            self._train.check()

    def image(self, split: Split, index: int, mode: str) -> Image.Image:
        """Open an image.

        Args:
            split: the split it belongs to.
            index: its position in the split, from 0.
            mode: PIL mode to convert it to, "L" or "RGB".

        Raises:
            DataError: it cannot be read.
        """
        images, indices = self._splits[split]
        return images.open(int(indices[index]), mode)

    def count(self, split: Split) -> int:
        """The number of images of a split.

        Args:
            split: as in `loader`.
        """
        return len(self._splits[split][1])

    def targets(self, split: Split) -> Indices:
        """(N,) class of each image of a split; -1 if it is not known."""
        images, indices = self._splits[split]
        return images.targets[indices]

    def labels(self, split: Split) -> list[str | None]:
        """The class name of each image of a split; None if there are no labels."""
        if not self.labelled:
            return [None] * self.count(split)
        return [self.class_names[target] for target in self.targets(split)]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour images."""
        return 1 if self.grey else 3

    def loader(
        self,
        split: Split,
        preprocessing: Preprocessing,
        *,
        batch_size: int = 64,
        workers: int | None = 0,
        training: bool = False,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        train_samples: int | None = None,
        device: torch.device | None = None,
        persistent_workers: bool = False,
        world: World | None = None,
    ) -> DataLoader[Batch]:
        """Batches of one split: images (B, C, H, W) float32 and targets (B,) int64.

        With Mixup or CutMix, targets are (B, classes) float32, and each row sums to 1.

        A training loader shuffles, and drops a last partial batch if there is a full one. It is
        deterministic: what it yields depends on seed and epoch, not on `workers`; see
        `ricciq.data.loader.set_epoch`.

        Args:
            split: "fit" and "holdout" are the training images, "val" the validation images.
            preprocessing: size and normalization of the tensors.
            batch_size: images in a batch.
            workers: processes that decode images; 0 decodes in this process, and None chooses
                by the machine and the number of batches.
            training: shuffle and augment.
            seed: of the order and the augmentation.
            augmentation: applied in training; None applies none.
            train_samples: use only this many images of "fit", a fixed stratified subset.
            device: where the batches are made; by default the CPU. A GPU gets bytes, and normalizes
                the next batch while the caller works on one.
            persistent_workers: as in torch's DataLoader; `ricciq.data.loader.close` ends them.
            world: the processes that share the images; each gets its own batch in every step.

        Returns:
            The loader.

        Raises:
            DataError: while iterating, for an image that cannot be read.
            UsageError: train_samples exceeds the number of images, there are fewer images than one
                batch for each process, or auto_augment is unknown.
        """
        images, indices = self._splits[split]
        if train_samples is not None:
            if split != "fit" or not 1 <= train_samples <= len(indices):
                raise UsageError(
                    f"train_samples {train_samples} does not fit the {len(indices)} {split} "
                    f"images of {self.name!r}; give at least 1 and at most "
                    f"{len(self._splits['fit'][1])}"
                )
            indices = _stratified(images.targets, indices, train_samples)
        return image_loader(
            images,
            indices,
            preprocessing,
            num_classes=self.num_classes,
            batch_size=batch_size,
            workers=workers,
            training=training,
            seed=seed,
            augmentation=augmentation,
            device=device or torch.device("cpu"),
            persistent_workers=persistent_workers,
            world=world or World(),
        )


def _all_of(images: Images) -> Indices:
    return np.arange(len(images.targets))


def _stratified(targets: Indices, indices: Indices, count: int) -> Indices:
    """Choose a fixed stratified subset of `indices`, of size `count`.

    Each image gets its rank within its class (in a fixed random order) divided by the size of the
    class, and the images with the smallest values are chosen. So every class comes once before any
    comes twice, and a smaller subset is part of a larger one.

    Returns:
        The chosen indices, ascending.
    """
    # RandomState, since NumPy promises never to change its stream.
    shuffled = np.random.RandomState(0).permutation(indices)
    of_class = targets[shuffled] + 1  # without labels they are -1
    by_class = np.argsort(of_class, kind="stable")
    sizes = np.bincount(of_class)
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(shuffled), dtype=np.int64)
    rank[by_class] = np.arange(len(shuffled)) - np.repeat(starts, sizes)
    progress = rank / sizes[of_class]
    chosen: Indices = np.sort(shuffled[np.argsort(progress, kind="stable")[:count]])
    return chosen
