"""A classification data set: its training part, what is held out of it, its validation part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from ricciq.data.augmentation import Augmentation
from ricciq.data.loader import Batch, picture_loader
from ricciq.data.preprocessing import Preprocessing
from ricciq.data.sources.base import Indices, Pictures
from ricciq.errors import DataError, UsageError
from ricciq.system.distributed import World

Split = Literal["fit", "holdout", "val"]
HOLDOUT_SHARE = 0.05


class PictureData:
    """A classification data set with a training and a validation part.

    A part of the training pictures is held out, the same ones in every run: the best epoch is
    chosen on them, so that the validation part is used once.

    Attributes:
        name: as given to --data.
        class_names: one name a class, in the order of the targets.
        grey: whether the pictures have one channel.
        labelled: whether targets are known; if not, a model has to name the classes and answer.
    """

    def __init__(
        self, name: str, class_names: Sequence[str], grey: bool, train: Pictures, val: Pictures
    ) -> None:
        """Set the usual hold-out aside."""
        self.name = name
        # Of a folder whose name is no UTF-8 as others, since JSON and pages hold nothing else.
        self.class_names = [name.encode(errors="backslashreplace").decode() for name in class_names]
        self.grey = grey
        self.labelled = bool(class_names)
        self._train, self._val = train, val
        self.hold_out(HOLDOUT_SHARE)

    def hold_out(self, share: float) -> None:
        """Set this share of the training pictures aside; a larger share holds the smaller ones."""
        train, val = self._train, self._val
        everything = np.arange(len(train.targets))
        if len(everything) < 2:
            raise DataError(
                f"data {self.name!r} has a single training picture: give at least two, one to "
                "train on and one to hold out"
            )
        # A class with one picture keeps it for training; where no class has two, any will do.
        counts = np.bincount(train.targets)
        spare = everything[counts[train.targets] > 1]
        pool = spare if len(spare) else everything
        wanted = max(round(share * len(pool)), int((counts > 1).sum()), 1)
        held_out = _stratified(train.targets, pool, wanted)
        self._splits: dict[Split, tuple[Pictures, Indices]] = {
            "fit": (train, np.setdiff1d(everything, held_out)),
            "holdout": (train, held_out),
            "val": (val, np.arange(len(val.targets))),
        }

    def set_answers(self, classes: int, answers: Mapping[Split, Indices]) -> None:
        """Let a model's answers stand for the labels that there are none of.

        Args:
            classes: how many the model knows; they are called 0, 1 and so on.
            answers: the class of every picture of a split; in splits without it becomes -1.
        """
        self.class_names = [str(number) for number in range(classes)]
        for split, (pictures, indices) in self._splits.items():
            pictures.targets[indices] = answers.get(split, -1)

    def picture(self, split: Split, index: int, mode: str) -> Image.Image:
        """A picture of a split in PIL mode "L" or "RGB".

        Raises:
            DataError: it cannot be read.
        """
        pictures, indices = self._splits[split]
        return pictures.open(int(indices[index]), mode)

    def labels(self, split: Split) -> list[str | None]:
        """The names of a split's classes, in order; None where pictures have no labels."""
        pictures, indices = self._splits[split]
        if not self.labelled:
            return [None] * len(indices)
        return [self.class_names[target] for target in pictures.targets[indices]]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """1 for grey pictures, 3 for colour."""
        return 1 if self.grey else 3

    def loader(
        self,
        split: Split,
        preprocessing: Preprocessing,
        *,
        batch_size: int = 64,
        workers: int = 0,
        training: bool = False,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        train_samples: int | None = None,
        pin_memory: bool = False,
        world: World | None = None,
    ) -> DataLoader[Batch]:
        """Batches of one split: pictures (B, C, H, W) float32 and targets (B,) int64.

        Where the augmentation mixes pictures, targets are (B, classes) float32 and sum to 1.

        A training loader shuffles, drops a last partial batch if there is a full one, and repeats
        itself: what it yields depends on seed and epoch, not on `workers`; see
        `ricciq.data.loader.set_epoch`.

        Args:
            split: "fit" and "holdout" share the training part, "val" is the validation part.
            preprocessing: size and normalization of the tensors.
            batch_size: pictures a batch.
            workers: processes that decode pictures; 0 decodes in this one.
            training: shuffle and augment.
            seed: start of the order and of the augmentation.
            augmentation: what to vary in training; None varies nothing.
            train_samples: take this many pictures of "fit", fixed and stratified.
            pin_memory: as in torch's DataLoader.
            world: the processes that share the pictures, each a batch of every step.

        Raises:
            DataError: while iterating, for a picture that cannot be read.
            UsageError: more train_samples than there are pictures, fewer pictures than a batch for
                every process, or an unknown auto_augment.
        """
        pictures, indices = self._splits[split]
        if train_samples is not None:
            if split != "fit" or not 1 <= train_samples <= len(indices):
                raise UsageError(
                    f"train_samples {train_samples} cannot be taken from the {len(indices)} "
                    f"{split} pictures of {self.name!r}: give at least 1 and at most "
                    f"{len(self._splits['fit'][1])}"
                )
            indices = _stratified(pictures.targets, indices, train_samples)
        return picture_loader(
            pictures,
            indices,
            preprocessing,
            num_classes=self.num_classes,
            batch_size=batch_size,
            workers=workers,
            training=training,
            seed=seed,
            augmentation=augmentation,
            pin_memory=pin_memory,
            world=world or World(),
        )


def _stratified(targets: Indices, indices: Indices, count: int) -> Indices:
    """Choose `count` of `indices`, always the same ones, every class in its proportion.

    The indices are put in a fixed order in which each class advances at its own pace, and its
    start is taken: every class comes once before any advances, and a smaller choice is part of
    a larger one.

    Returns:
        The chosen indices, ascending.
    """
    # RandomState, as its stream is the one that NumPy promises never to change.
    shuffled = np.random.RandomState(0).permutation(indices)
    sizes = Counter(targets[shuffled].tolist())
    seen: Counter[int] = Counter()
    progress = np.empty(len(shuffled))
    for position, target in enumerate(targets[shuffled].tolist()):
        progress[position] = seen[target] / sizes[target]
        seen[target] += 1
    chosen: Indices = np.sort(shuffled[np.argsort(progress, kind="stable")[:count]])
    return chosen
