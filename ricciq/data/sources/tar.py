"""The files inside tar archives: indexed from the headers, read one by one, never extracted.

A file is located by its archive, offset and size, so it can be read in any order and in any process
with an open and a seek.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from ricciq.data.sources.base import EncodedImages
from ricciq.data.sources.files import Names
from ricciq.errors import DataError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
LARGEST_HEADER = 1 << 20
"""In bytes; the longest path that an operating system allows has a few thousand."""
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


class Member(NamedTuple):
    """A file inside a tar.

    Attributes:
        archive: the tar's path.
        name: the folders and the file name, joined by "/", without "..".
        offset: position of its first byte in the archive.
        size: in bytes.
    """

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        """The name of the file in an error message."""
        return f"{self.name} in {self.archive}"

    def read(self) -> bytes:
        """The content.

        Raises:
            OSError: the archive is missing, or shorter than before.
        """
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.archive} is shorter than before")
        return content


class ImagesInTars(EncodedImages):
    """Images inside tars.

    Args:
        members: where each image is.
        targets: the class of each image.
    """

    def __init__(self, members: Sequence[Member], targets: Sequence[int]) -> None:
        super().__init__(targets)
        # Not a list of a million tuples, which would be copied to every worker.
        self._names = Names(member.name for member in members)
        self._archives = list(dict.fromkeys(member.archive for member in members))
        position = {archive: i for i, archive in enumerate(self._archives)}
        self._places = np.array([(position[m.archive], m.offset, m.size) for m in members])

    def name(self, index: int) -> str:
        """The member and its archive."""
        return str(self._member(index))

    def source(self, index: int) -> BinaryIO:
        """A stream of the member's bytes."""
        return BytesIO(self._member(index).read())

    def _member(self, index: int) -> Member:
        archive, offset, size = self._places[index].tolist()
        return Member(self._archives[archive], self._names[index], offset, size)


def files_in_tar(path: Path) -> list[Member]:
    """The files of a tar that are not hidden, in its own order.

    Raises:
        DataError: it is not a tar, compressed, damaged or truncated, or has links or devices.
    """
    return _files(path, path, 0, _size(path))


def files_in_inner_tar(inner: Member) -> list[Member]:
    """The files of a tar within a tar that are not hidden; errors as in `files_in_tar`."""
    return _files(inner.archive, inner, inner.offset, inner.offset + inner.size)


def refuse_compressed(path: Path | Member) -> None:
    """Refuse a compressed tar.

    Raises:
        DataError: the name of the file is that of a compressed tar.
    """
    if path.name.lower().endswith(COMPRESSED_SUFFIXES):
        raise DataError(
            f"tar {path} is compressed, so its files cannot be read one by one; unpack it to a "
            "plain .tar"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"tar {path} cannot be read ({error}); check the path") from None


def _files(path: Path, shown: Path | Member, start: int, end: int) -> list[Member]:
    found: list[Member] = []
    try:
        with path.open("rb") as file:
            found += _members(path, file, shown, start, end)
    except DataError:
        raise
    except Exception as error:  # on damaged headers tarfile raises nearly anything
        reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
        raise DataError(f"tar {shown} cannot be read ({reason}); pack it again") from error
    for name, count in Counter(member.name for member in found).most_common(1):
        if count > 1:
            raise DataError(f"tar {shown} has {name} {count} times; pack it again with one each")
    return found


class _Headers:
    """The file that tarfile reads headers from, with a limit on the size of a header."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self.close = file.seek, file.tell, file.close
        self._read = file.read

    def read(self, size: int) -> bytes:
        """As a file does.

        Raises:
            ValueError: the header is too long, and could fill the memory.
        """
        if size > LARGEST_HEADER:
            raise ValueError(f"it has a header of {size} bytes")
        return self._read(size)


def _members(
    path: Path, file: BinaryIO, shown: Path | Member, start: int, end: int
) -> Iterator[Member]:
    """What `files_in_tar` lists, for the tar between two offsets in a file."""
    file.seek(start)
    head = file.read(tarfile.BLOCKSIZE)
    for magic, compression in COMPRESSED.items():
        if head.startswith(magic) and b"ustar" not in head:
            raise DataError(
                f"tar {shown} is compressed with {compression}, so its files cannot be read one by "
                "one; unpack it to a plain .tar"
            )
    file.seek(start)
    with tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:") as tar:
        while (entry := tar.next()) is not None:
            # Otherwise the headers of a million images would fill a gigabyte.
            tar.members.clear()  # type: ignore[attr-defined]
            if entry.size < 0 or entry.offset_data + entry.size > end:
                raise DataError(
                    f"tar {shown} is truncated or damaged: the header of {entry.name} says "
                    f"{entry.size} bytes, which are not in the file; copy it again"
                )
            name = _plain(entry.name)
            if entry.isdir() or _hidden(name):
                continue
            if not entry.isreg() or entry.issparse():
                raise DataError(
                    f"{entry.name} in {shown} is not a regular file; pack the tar again with "
                    "tar --dereference --hard-dereference"
                )
            yield Member(path, name, entry.offset_data, entry.size)
        _check_end(file, shown, tar.offset, end)


def _check_end(file: BinaryIO, shown: Path | Member, offset: int, end: int) -> None:
    """Check that a tar ends with zeros: tarfile takes a damaged header for its end."""
    file.seek(offset)
    rest = end - offset
    if rest < tarfile.BLOCKSIZE:
        raise DataError(f"tar {shown} is truncated, since it has no end mark; copy it again")
    while rest > 0 and (piece := file.read(min(rest, 1 << 20))):
        rest -= len(piece)
        if piece.strip(b"\0"):
            raise DataError(
                f"tar {shown} is damaged, or two tars in one: what follows after {offset} bytes is "
                "not a file of it; pack it again"
            )


def _plain(name: str) -> str:
    """A member's name without the parts that could lead out of a folder if it were extracted."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _hidden(name: str) -> bool:
    """Whether the name of a file or a folder begins with a dot, as in what macOS adds to tars."""
    return name.startswith(".") or "/." in name
