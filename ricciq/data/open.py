"""A data set by the name given to --data.

Images are opened strictly. timm's own folder data set replaces an image that it cannot read by
another one, which changes accuracies silently; here such an image ends the run.
"""

from __future__ import annotations

from pathlib import Path

from ricciq.data.dataset import HOLDOUT_SHARE, ImageData
from ricciq.data.sources.base import Parts
from ricciq.data.sources.catalog import find_source, forms
from ricciq.errors import DataError, UsageError


def open_data(name: str, root: Path | None = None, holdout: float = HOLDOUT_SHARE) -> ImageData:
    """Open a data set by the name given to --data.

    Args:
        name: the value of --data, in one of the forms that `ricciq.data.sources.catalog` lists.
        root: the value of --data-dir: folder of the files, or cache of the data set's library.
        holdout: share of the training images to hold out, 0 to 1.

    Returns:
        The data set; its `loader` gives batches of a split.

    Raises:
        DataError: the data set is missing, unreadable or lacks a split.
        UsageError: the form of data needs a root, and none is given.
    """
    try:
        class_names, train, val = _open(name, root)
        data = ImageData(name, class_names, train.grey(), train, val)
    except OSError as error:
        raise DataError(
            f"data {name!r} cannot be read ({error}); check the path and its permissions"
        ) from error
    data.hold_out(holdout)
    return data


def _open(name: str, root: Path | None) -> Parts:
    source = find_source(name)
    if source is None:
        raise DataError(
            f"there is no data set {name!r}; give {forms()}, or a folder of images without labels"
        )
    if source.needs_root and root is None:
        raise UsageError(f"data {name!r} needs --data-dir; give the folder of its files")
    return source.open(name, root)
