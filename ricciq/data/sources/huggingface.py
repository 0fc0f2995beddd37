"""The form hfds/NAME: a Hugging Face data set from the hub or a folder, through its library."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ricciq.data.sources.base import EncodedImages, Indices, Parts
from ricciq.errors import DataError, on_one_line
from ricciq.system.offline import is_network_forbidden, would_be_downloaded

VALIDATION_NAMES = ("validation", "val", "valid", "test")


class HubImages(EncodedImages):
    """The images in a column of a Hugging Face data set, which uses memory-mapped files.

    Args:
        rows: a split of the data set.
        column: name of the column of images.
        where: the split and the data set, for errors.
        targets: the class of each image.
    """

    def __init__(self, rows: Any, column: str, where: str, targets: Indices) -> None:
        super().__init__(targets)
        self._rows, self._column, self._where = rows, column, where

    def name(self, index: int) -> str:
        """The row, the split and the data set, and the file if the row names one."""
        path = (self._rows[index][self._column] or {}).get("path")
        return f"{index} of {self._where}" + (f" ({path})" if path else "")

    def source(self, index: int) -> str | BinaryIO:
        """A stream of the bytes in a row, or the path that it names.

        Raises:
            ValueError: the row is empty.
        """
        cell = self._rows[index][self._column]
        if cell is None or not (cell["bytes"] or cell["path"]):
            raise ValueError("the row is empty")
        return BytesIO(cell["bytes"]) if cell["bytes"] else str(cell["path"])


def open_source(name: str, root: Path | None) -> Parts:
    """Open a Hugging Face data set.

    Args:
        name: hfds/NAME, where NAME is a name on the hub or a folder, as for datasets.load_dataset.
        root: cache folder of the library; None is its default.

    Returns:
        The class names and both parts.

    Raises:
        DataError: the library or the data set is missing, or its rows do not have one image and
            one label each.
    """
    name = name.removeprefix("hfds/")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data 'hfds/{name}' needs the datasets library; pip install 'ricciq[hf]'"
        ) from None
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise DataError(f"there is no folder {name} for data 'hfds/{name}'; correct the name")
    try:
        splits = datasets.load_dataset(name, cache_dir=None if root is None else str(root))
    except Exception as error:  # the library raises whatever its parsers and the network do
        if is_network_forbidden() and not Path(name).is_dir():
            otherwise = "give the folder of a copy as in hfds/./pets"
            raise DataError(would_be_downloaded(f"data 'hfds/{name}'", otherwise)) from None
        reason = on_one_line(f"{type(error).__name__}: {error}", 200).rstrip(". ")
        raise DataError(
            f"data 'hfds/{name}' cannot be loaded ({reason}); correct the name, connect to the "
            "network, or give the folder of a copy as in hfds/./pets"
        ) from error
    chosen = next((split for split in VALIDATION_NAMES if split in splits), None)
    if "train" not in splits or chosen is None:
        raise DataError(
            f"data 'hfds/{name}' has the splits {', '.join(splits)}; it needs train, and one of "
            f"{', '.join(VALIDATION_NAMES)}"
        )
    # The library checks that all splits have the same features.
    names, train = _part(splits["train"], f"split train of data 'hfds/{name}'")
    _, val = _part(splits[chosen], f"split {chosen} of data 'hfds/{name}'")
    return Parts(names, train, val)


def _part(rows: Any, where: str) -> tuple[list[str], HubImages]:
    """The class names and the images of a split; labels are read without decoding images."""
    from datasets import ClassLabel, Image

    columns = [
        [name for name, feature in rows.features.items() if isinstance(feature, kind)]
        for kind in (Image, ClassLabel)
    ]
    if any(len(found) != 1 for found in columns):
        listed = ", ".join(f"{name} ({type(f).__name__})" for name, f in rows.features.items())
        raise DataError(
            f"{where} has the columns {listed}; it needs one Image and one ClassLabel, so remove "
            "or cast the others"
        )
    (image,), (label,) = columns
    names = list(rows.features[label].names)
    labels = rows.select_columns([label]).with_format("arrow")[:][label]
    targets = np.asarray(labels.fill_null(-1).to_numpy(), dtype=np.int64)
    if (unlabelled := np.flatnonzero((targets < 0) | (targets >= len(names)))).size:
        row = int(unlabelled[0])
        raise DataError(
            f"row {row} of {where} has the label {targets[row]}, but the classes are 0 to "
            f"{len(names) - 1}; remove the row, or the split if it has no labels"
        )
    encoded = rows.select_columns([image]).cast_column(image, Image(decode=False))
    return names, HubImages(encoded, image, where, targets)
