"""A data set by the name given to --data.

Images are opened strictly. timm's own folder data set replaces an image that it cannot read by
another one, which changes accuracies silently; here such an image ends the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ricciq.data.dataset import HOLDOUT_SHARE, ImageData
from ricciq.data.sources.base import Parts
from ricciq.data.sources.catalog import SOURCES, EvaluationSplit, Source, find_source, forms
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
    with _reading(name):
        data = _data_set(name, _source(name, root).open(name, root))
    if holdout != HOLDOUT_SHARE:
        data.hold_out(holdout)
    return data


def open_to_evaluate(
    name: str, root: Path | None = None, split: EvaluationSplit = "val"
) -> ImageData:
    """Open the images of a data set to evaluate on. A folder needs no others.

    Args:
        name: the value of --data, as for `open_data`.
        root: the value of --data-dir.
        split: which images.

    Returns:
        The data set, perhaps without training images; the images are its split "val".

    Raises:
        DataError: as `open_data`.
        UsageError: as `open_data`.
    """
    with _reading(name):
        return _data_set(name, _source(name, root).open_split(name, root, split))


def _data_set(name: str, parts: Parts) -> ImageData:
    class_names, train, val, messages = parts
    data = ImageData(name, class_names, (train or val).grey(), train, val)
    data.messages += messages
    return data


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data {name!r} cannot be read ({error}); check the path and its permissions"
        ) from error


def find_again(name: str, root: Path | None, near: Path) -> tuple[str, Path | None]:
    """Find the data that a model was made with, perhaps from another working directory.

    A relative path is tried from the folder of the model's file, its parent and its grandparent,
    which is where a run in ``runs/NAME`` was started, and then from the working directory.

    Args:
        name: the value of --data that the model was made with.
        root: the value of --data-dir.
        near: file or folder of the model.

    Returns:
        The values to give to `open_data`.

    Raises:
        DataError: the data are not where they were.
    """
    source = next((s for s in SOURCES if not s.is_path and s.takes(name)), None)
    files = root if source is not None and source.needs_root else None
    prefix = "hfds/" if name.startswith("hfds/.") else ""
    if source is not None and files is None and not prefix:
        return name, root  # it is not found by a path
    written = files or Path(name.removeprefix(prefix))
    here = near.resolve()
    folders = [here, *here.parents] if here.is_dir() else list(here.parents)
    for base in (*folders[:3], Path()):
        found = base / written  # base has no effect on an absolute path
        if os.path.isdir(found):
            at = found if found == written else found.resolve()
            return (name, at) if files else (f"{prefix}{at}", root)
    raise DataError(
        f"the data {written} that {near} was made with are no longer there; give --data"
    )


def _source(name: str, root: Path | None) -> Source:
    source = find_source(name)
    if source is None:
        raise DataError(
            f"there is no data set {name!r}; give {forms()}, or a folder of images without labels"
        )
    if source.needs_root and root is None:
        raise UsageError(f"data {name!r} needs --data-dir; give the folder of its files")
    return source
