"""A data set by the name given to --data.

Images are opened strictly: timm's own folder data set puts another sample in the place of an image
it cannot read, which changes accuracies without a word; here such an image ends the run.
"""

from __future__ import annotations

from pathlib import Path

from ricciq.data.dataset import HOLDOUT_SHARE, PictureData
from ricciq.data.sources.base import Parts
from ricciq.data.sources.digits import open_digits
from ricciq.data.sources.folder import open_folder
from ricciq.data.sources.huggingface import open_hub
from ricciq.data.sources.torchvision import open_torch
from ricciq.data.sources.webdataset import open_shards
from ricciq.errors import DataError, UsageError

FORMS = (
    "a folder with train/ and val/ (or validation/), `digits`, torch/NAME or wds/NAME with "
    "--data-dir, or hfds/NAME; a folder of nothing but pictures has no labels"
)


def open_data(name: str, root: Path | None = None, holdout: float = HOLDOUT_SHARE) -> PictureData:
    """Open a data set by the name given to --data.

    Args:
        name: a folder, `digits`, `torch/NAME`, `wds/NAME` or `hfds/NAME`.
        root: --data-dir: the folder of torchvision's files or of webdataset's shards, or the cache
            of the datasets library; used by these three only.
        holdout: the share of the training pictures to hold out.

    Returns:
        The data set, whose `loader` gives batches of its splits.

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
        return open_digits()
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
