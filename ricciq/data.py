"""Every form of --data, as loaders: folders, tars, webdataset, Hugging Face, torchvision, `digits`.

Pictures are opened strictly: timm's own folder data set puts another sample in the place of a
picture it cannot read, which changes accuracies without a word; here such a picture ends the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from ricciq.errors import DataError, UsageError
from ricciq.folders import open_folder
from ricciq.hub import open_hub
from ricciq.loading import Batch, picture_loader
from ricciq.pictures import Indices, Parts, PictureArrays, Pictures
from ricciq.preprocessing import Augmentation, Preprocessing
from ricciq.shards import open_shards
from ricciq.system.distributed import World
from ricciq.torchsets import open_torch

Split = Literal["fit", "holdout", "val"]

FORMS = (
    "a folder with train/ and val/ (or validation/), `digits`, torch/NAME or wds/NAME with "
    "--data-dir, or hfds/NAME; a folder of nothing but pictures has no labels"
)
HOLDOUT_SHARE = 0.05
DIGITS_VALIDATION = 360


def open_data(name: str, root: Path | None, holdout: float = HOLDOUT_SHARE) -> PictureData:
    """Open a data set by the name given to --data.

    Args:
        name: a folder, `digits`, `torch/NAME`, `wds/NAME` or `hfds/NAME`.
        root: --data-dir: the folder of torchvision's files or of webdataset's shards, or the cache
            of the datasets library; used by these three only.
        holdout: the share of the training pictures to hold out.

    Raises:
        DataError: the data set is missing, unreadable or has no proper splits.
        UsageError: torch/NAME or wds/NAME without a root.
    """
    try:
        class_names, train, val = _open(name, root)
        data = PictureData(name, class_names, train.grey(), train, val)
    except OSError as error:
        raise DataError(f"data {name!r} cannot be read ({error}): allow it") from error
    data.hold_out(holdout)
    return data


def _open(name: str, root: Path | None) -> Parts:
    form, _, rest = name.partition("/")
    if name == "digits":
        return _open_digits()
    if form in ("torch", "wds") and rest:
        if root is None:
            raise UsageError(f"data {name!r} needs --data-dir: give the folder its files are in")
        return open_torch(rest, root) if form == "torch" else open_shards(root)
    if form == "hfds" and rest:
        return open_hub(rest, root)
    if form in ("hfids", "tfds") and rest:
        raise DataError(
            f"data {name!r} would come as a stream, which has no order that can be repeated: use "
            "hfds/NAME, or write it as webdataset shards and use wds/NAME"
        )
    folder = Path(name)
    if not folder.is_dir():
        raise DataError(f"there is no data set {name!r}: give {FORMS}")
    return open_folder(folder)


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
        self.class_names = list(class_names)
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
        batch_size: int,
        workers: int,
        training: bool,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        train_samples: int | None = None,
        pin_memory: bool = False,
        world: World | None = None,
    ) -> DataLoader[Batch]:
        """Batches of one split: pictures (B, C, H, W) float32 and targets (B,) int64.

        Where the augmentation mixes pictures, targets are (B, classes) float32 and sum to 1.

        A training loader shuffles, drops a last partial batch if there is a full one, and repeats
        itself: what it yields depends on seed and epoch (see `ricciq.loading.set_epoch`), not on
        `workers`.

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


def _open_digits() -> Parts:
    """scikit-learn's 1,797 scanned digits of 8x8 pixels, 360 of them for validation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # Grey levels 0..16 become bytes: value * 255 / 16, rounded half to even.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    train, val = train_test_split(
        np.arange(len(pixels)),
        test_size=DIGITS_VALIDATION,
        stratify=digits.target,
        random_state=0,
    )
    return Parts(
        [str(name) for name in digits.target_names],
        PictureArrays(pixels[train], digits.target[train]),
        PictureArrays(pixels[val], digits.target[val]),
    )
