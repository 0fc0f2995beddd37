"""A data set by the name given to --data.

Images are opened strictly: timm's own folder data set puts another sample in the place of an image
it cannot read, which changes accuracies without a word; here such an image ends the run.
"""

from __future__ import annotations

from pathlib import Path

from ricciq.data.dataset import HOLDOUT_SHARE, PictureData
from ricciq.data.sources.base import Parts
from ricciq.data.sources.catalog import find_source, forms
from ricciq.errors import DataError, UsageError


def open_data(name: str, root: Path | None = None, holdout: float = HOLDOUT_SHARE) -> PictureData:
    """Open a data set by the name given to --data.

    Args:
        name: in one of the forms that `ricciq.data.sources.catalog` lists.
        root: --data-dir: the folder of the data set's files, or the cache of its library.
        holdout: the share of the training images to hold out.

    Returns:
        The data set, with that share held out.

    Returns:
        The data set, whose `loader` gives batches of its splits.

    Raises:
        DataError: the data set is missing, unreadable or has no proper splits.
        UsageError: the source needs a root, and there is none.
    """
    try:
        class_names, train, val = _open(name, root)
        data = PictureData(name, class_names, train.grey(), train, val)
    except OSError as error:
        raise DataError(f"data {name!r} cannot be read ({error}): allow it") from error
    data.hold_out(holdout)
    return data


def _open(name: str, root: Path | None) -> Parts:
    source = find_source(name)
    if source is None:
        raise DataError(
            f"there is no data set {name!r}: give {forms()}; a folder of nothing but images has no "
            "labels"
        )
    if source.needs_root and root is None:
        raise UsageError(f"data {name!r} needs --data-dir: give the folder its files are in")
    return source.open(name, root)
