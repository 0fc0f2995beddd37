"""Every form of --data, as loaders: a folder, `digits`, or a torchvision set through timm.

Pictures are opened strictly: timm's own folder data set puts another sample in the place of a
picture it cannot read, which changes accuracies without a word; here such a picture ends the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from timm.data.dataset_factory import create_dataset
from timm.data.readers.img_extensions import IMG_EXTENSIONS
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader

from ricciq.distributed import World
from ricciq.errors import DataError, UsageError
from ricciq.loading import Batch, picture_loader
from ricciq.pictures import Indices, PictureArrays, PictureFiles, Pictures
from ricciq.preprocessing import Augmentation, Preprocessing

Split = Literal["fit", "holdout", "val"]

FORMS = (
    "a folder with train/ and val/ (or validation/), `digits`, "
    "or torch/NAME with --data-dir, such as torch/fashion_mnist"
)
# timm's name of each torchvision set that holds its pictures in memory, and torchvision's.
TORCH_NAMES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "mnist": "MNIST",
}
HOLDOUT_SHARE = 0.05
DIGITS_VALIDATION = 360


def open_data(name: str, root: Path | None, holdout: float = HOLDOUT_SHARE) -> PictureData:
    """Open a data set by the name given to --data.

    Args:
        name: a folder, `digits`, or `torch/NAME`.
        root: the folder that torchvision's files lie in (--data-dir); used by torch/NAME only.
        holdout: the share of the training pictures to hold out.

    Raises:
        DataError: the data set is missing, unreadable or has no proper splits.
        UsageError: torch/NAME without a root.
    """
    data = _open(name, root)
    data.hold_out(holdout)
    return data


def _open(name: str, root: Path | None) -> PictureData:
    form, _, rest = name.partition("/")
    if name == "digits":
        return _open_digits()
    if form == "torch" and rest:
        return _open_torch(rest, root)
    if form in ("wds", "hfds", "hfids", "tfds") and rest:
        raise DataError(f"data {name!r} is of a form this version does not read: give {FORMS}")
    folder = Path(name)
    if not folder.is_dir():
        raise DataError(f"there is no data set {name!r}: give {FORMS}")
    try:
        return _open_folder(folder)
    except OSError as error:
        raise DataError(f"data folder {folder} cannot be listed ({error}): allow it") from error


class PictureData:
    """A classification data set with a training and a validation part.

    A part of the training pictures is held out, the same ones in every run: the best epoch is
    chosen on them, so that the validation part is used once.

    Attributes:
        name: as given to --data.
        class_names: one name a class, in the order of the targets.
        grey: whether the pictures have one channel.
    """

    def __init__(
        self, name: str, class_names: Sequence[str], grey: bool, train: Pictures, val: Pictures
    ) -> None:
        """Set the usual hold-out aside."""
        self.name = name
        self.class_names = list(class_names)
        self.grey = grey
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


def _open_folder(folder: Path) -> PictureData:
    train_folder = folder / "train"
    val_folder = next((p for n in ("val", "validation") if (p := folder / n).is_dir()), None)
    if not train_folder.is_dir():
        raise DataError(f"data folder {folder} has no train/ in it: give {FORMS}")
    if val_folder is None:
        raise DataError(
            f"data folder {folder} has neither val/ nor validation/ in it: put pictures that are "
            "not in train/ there, one folder a class"
        )
    class_names, train = _read_split(train_folder)
    val_names, val = _read_split(val_folder)
    if odd := sorted(set(class_names) ^ set(val_names), key=natural_key):
        shown = ", ".join(odd[:5]) + (", ..." if len(odd) > 5 else "")
        raise DataError(
            f"{train_folder} and {val_folder} do not hold the same classes ({shown} in one only): "
            "give both the same class folders"
        )
    return PictureData(str(folder), class_names, train.grey(), train, val)


def _read_split(folder: Path) -> tuple[list[str], PictureFiles]:
    """The class names of a folder, in timm's order, and its pictures, nested folders included."""
    visible = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    class_names = sorted((entry.name for entry in visible if entry.is_dir()), key=natural_key)
    if not class_names:
        raise DataError(f"{folder} has no class folders in it: put the pictures in one a class")
    for entry in visible:
        if entry.suffix.lower() in IMG_EXTENSIONS and entry.is_file():
            raise DataError(f"picture {entry} lies beside the class folders: move it into one")
    paths: list[str] = []
    targets: list[int] = []
    for target, class_name in enumerate(class_names):
        found, _ = find_images_and_targets(str(folder / class_name), types=IMG_EXTENSIONS)
        if not found:
            raise DataError(
                f"class folder {folder / class_name} holds no pictures "
                f"({', '.join(IMG_EXTENSIONS)}): fill or remove it"
            )
        paths += [path for path, _ in found]
        targets += [target] * len(found)
    return class_names, PictureFiles(paths, targets)


def _open_digits() -> PictureData:
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
    return PictureData(
        "digits",
        [str(name) for name in digits.target_names],
        True,
        PictureArrays(pixels[train], digits.target[train]),
        PictureArrays(pixels[val], digits.target[val]),
    )


def _open_torch(name: str, root: Path | None) -> PictureData:
    if name not in TORCH_NAMES:
        raise DataError(
            f"there is no data set 'torch/{name}': give one of "
            + ", ".join(f"torch/{known}" for known in TORCH_NAMES)
        )
    if root is None:
        raise UsageError(f"data 'torch/{name}' needs --data-dir: give the folder its files are in")
    try:
        train, val = (
            create_dataset(f"torch/{name}", root=str(root), split=split, download=False)
            for split in ("train", "validation")
        )
    except Exception as error:  # torchvision raises whatever its parsers meet
        raise DataError(
            f"torch/{name} is missing or damaged in {root}: point --data-dir at a folder that "
            f"torchvision.datasets.{TORCH_NAMES[name]}(folder, download=True) has filled"
        ) from error
    pixels = [np.asarray(part.data) for part in (train, val)]
    if grey := pixels[0].ndim == 3:
        pixels = [part[..., None] for part in pixels]
    parts = PictureArrays(pixels[0], train.targets), PictureArrays(pixels[1], val.targets)
    return PictureData(f"torch/{name}", train.classes, grey, *parts)
