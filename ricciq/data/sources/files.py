"""Images in files: found in folders, and kept in little memory."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ricciq.data.classes import printable_name
from ricciq.data.sources.base import IMAGE_SUFFIXES, EncodedImages
from ricciq.errors import DataError
from ricciq.system.natural_order import natural_order


class Names:
    """Many strings as bytes in one piece.

    A million of them in a list would take a hundred megabytes, and as many again in each worker,
    since a process that reads a string writes to its reference count.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._joined = bytearray()
        ends = array("q", [0])
        for name in names:
            self._joined += name.encode("utf-8", "surrogatepass")  # names may be invalid UTF-8
            ends.append(len(self._joined))
        self._ends = np.asarray(ends)

    def __getitem__(self, index: int) -> str:
        """One of them.

        Args:
            index: from 0.
        """
        joined = self._joined[self._ends[index] : self._ends[index + 1]]
        return joined.decode("utf-8", "surrogatepass")


class ImageFiles(EncodedImages):
    """Images in files.

    Args:
        labelled: the path and the class of each image.
    """

    def __init__(self, labelled: Iterable[tuple[str, int]]) -> None:
        folders: dict[str, int] = {}
        places, targets = array("i"), array("q")

        def names() -> Iterator[str]:
            for path, target in labelled:
                folder, separator, name = path.rpartition(os.sep)
                places.append(folders.setdefault(folder + separator, len(folders)))
                targets.append(target)
                yield name

        self._names = Names(names())
        self._folders, self._places = list(folders), np.asarray(places)
        super().__init__(np.asarray(targets))

    def name(self, index: int) -> str:
        """The path."""
        folder: str = self._folders[self._places[index]]
        return folder + self._names[index]

    def source(self, index: int) -> str:
        """The path.

        Raises:
            OSError: it is missing, or a pipe or a device, which might never end.
        """
        path = self.name(index)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is not a regular file")
        return path

    def check(self) -> None:
        """Look at every file, which is far quicker than to decode it.

        Raises:
            DataError: one is missing, empty, or no regular file.
        """
        for index in range(len(self.targets)):
            try:
                if not os.stat(self.source(index)).st_size:
                    raise OSError("it is empty")
            except OSError as error:
                raise self.unreadable(index, error.strerror or str(error)) from None


RUBBISH = {".ds_store", ".localized", "thumbs.db", "desktop.ini", "__macosx", ".ipynb_checkpoints"}
"""What systems and tools leave in folders, in lower case; it needs no message."""


SHOWN = 5
"""How many files that are not used are named."""


def told_unused(left_out: Sequence[str]) -> list[str]:
    """A sentence about files and folders that are not used, if there are any.

    Args:
        left_out: their paths.
    """
    if not left_out:
        return []
    shown = ", ".join(printable_name(name) for name in left_out[:SHOWN])
    more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
    reason = f"; images are read from {', '.join(IMAGE_SUFFIXES)} files"
    only_folders = all(path.endswith(os.sep) for path in left_out)
    return [f"not used: {shown}{more}{'' if only_folders else reason}"]


def is_rubbish(name: str) -> bool:
    """Whether a file or folder is one that a system or a tool has left, such as ._cat.png."""
    return name.startswith("._") or name.lower() in RUBBISH


def images_below(folder: str, left_out: list[str] | None = None) -> list[str]:
    """The images in a folder at any depth, in natural order, without hidden ones.

    Args:
        folder: its path.
        left_out: receives the paths of everything else, but for rubbish.

    Returns:
        Their paths.

    Raises:
        DataError: the folder, or one in it, cannot be read.
    """
    found: list[str] = []
    others = [] if left_out is None else left_out

    def refuse(error: OSError) -> None:
        raise DataError(
            f"folder {error.filename} cannot be read ({error.strerror}); check its permissions"
        )

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        start = os.path.join(place, "")
        hidden = [name for name in folders if name.startswith(".") or is_rubbish(name)]
        folders[:] = [name for name in folders if name not in hidden]
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                found.append(start + name)
            elif not is_rubbish(name):
                others.append(start + name)
        others += [f"{start}{name}{os.sep}" for name in hidden if not is_rubbish(name)]
    others.sort(key=natural_order)
    return sorted(found, key=lambda path: natural_order(path[len(folder) :]))
