"""The files inside tar archives: indexed from the headers, read one by one, never extracted.

A file's place is its archive, its first byte and its length. Whoever has that can read it, in any
order and in any process, with nothing but an open and a seek.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from ricciq.data.sources.base import EncodedPictures
from ricciq.errors import DataError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
LARGEST_HEADER = 1 << 20
"""In bytes; the longest name that a system takes is a few thousand."""
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


class Member(NamedTuple):
    """A file inside a tar.

    Attributes:
        archive: the tar's path.
        name: the folders and the file name, joined by "/"; nothing in it leads out of the tar.
        offset: of its first byte in the archive.
        size: in bytes.
    """

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        """What to call it in a message."""
        return f"{self.name} in {self.archive}"

    def read(self) -> bytes:
        """The content.

        Raises:
            OSError: the archive is gone, or shorter than it was.
        """
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.archive} has become shorter")
        return content


class PicturesInTars(EncodedPictures):
    """Pictures inside tars."""

    def __init__(self, members: Sequence[Member], targets: Sequence[int]) -> None:
        super().__init__(targets)
        # An array of numbers, since a list of a million tuples would be copied to every worker.
        self._names = [member.name for member in members]
        self._archives = list(dict.fromkeys(member.archive for member in members))
        position = {archive: i for i, archive in enumerate(self._archives)}
        self._places = np.array([(position[m.archive], m.offset, m.size) for m in members])

    def name(self, index: int) -> str:
        """The member and its archive."""
        return str(self._member(index))

    def source(self, index: int) -> BinaryIO:
        """The content."""
        return BytesIO(self._member(index).read())

    def _member(self, index: int) -> Member:
        archive, offset, size = self._places[index].tolist()
        return Member(self._archives[archive], self._names[index], offset, size)


def files_in_tar(path: Path) -> list[Member]:
    """The visible files of a tar, in its own order.

    Raises:
        DataError: it is no tar, compressed, damaged, cut short, or holds what is no plain file.
    """
    return _files(path, path, 0, _size(path))


def files_in_inner_tar(inner: Member) -> list[Member]:
    """The visible files of a tar that lies within a tar; errors as for `files_in_tar`."""
    return _files(inner.archive, inner, inner.offset, inner.offset + inner.size)


def refuse_compressed(path: Path | Member) -> None:
    """Raise a DataError where a file's name says that it is a compressed tar."""
    if path.name.lower().endswith(COMPRESSED_SUFFIXES):
        raise DataError(
            f"tar {path} is compressed, so nothing in it can be found quickly: unpack it to a "
            "plain .tar"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"tar {path} cannot be read ({error}): give a file that is there") from None


def _files(path: Path, shown: Path | Member, start: int, end: int) -> list[Member]:
    found: list[Member] = []
    try:
        with path.open("rb") as file:
            found += _members(path, file, shown, start, end)
    except DataError:
        raise
    except Exception as error:  # tarfile raises nearly anything on damaged headers
        reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
        raise DataError(f"tar {shown} cannot be read ({reason}): pack it again") from error
    for name, count in Counter(member.name for member in found).most_common(1):
        if count > 1:
            raise DataError(f"tar {shown} holds {name} {count} times: pack it again with one each")
    return found


class _Headers:
    """A tar as tarfile sees it: it reads only headers here, some as long as they say they are."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self.close = file.seek, file.tell, file.close
        self._read = file.read

    def read(self, size: int) -> bytes:
        """As of a file.

        Raises:
            ValueError: so long a header could fill the memory.
        """
        if size > LARGEST_HEADER:
            raise ValueError(f"it has a header of {size} bytes")
        return self._read(size)


def _members(
    path: Path, file: BinaryIO, shown: Path | Member, start: int, end: int
) -> Iterator[Member]:
    """What `files_in_tar` lists, of the tar that lies between two bytes of a file."""
    file.seek(start)
    head = file.read(tarfile.BLOCKSIZE)
    for magic, compression in COMPRESSED.items():
        if head.startswith(magic) and b"ustar" not in head:
            raise DataError(
                f"tar {shown} is compressed with {compression}, so nothing in it can be found "
                "quickly: unpack it to a plain .tar"
            )
    file.seek(start)
    with tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:") as tar:
        while (entry := tar.next()) is not None:
            # Or the headers of a million pictures would fill a gigabyte.
            tar.members.clear()  # type: ignore[attr-defined]
            if entry.size < 0 or entry.offset_data + entry.size > end:
                raise DataError(
                    f"tar {shown} is cut short or damaged: {entry.name} has {entry.size} bytes by "
                    "its header, which are not there; copy it again"
                )
            name = _plain(entry.name)
            if entry.isdir() or _hidden(name):
                continue
            if not entry.isreg() or entry.issparse():
                raise DataError(
                    f"{entry.name} in {shown} is a link or no plain file: pack the tar again with "
                    "tar --dereference --hard-dereference"
                )
            yield Member(path, name, entry.offset_data, entry.size)
        _check_end(file, shown, tar.offset, end)


def _check_end(file: BinaryIO, shown: Path | Member, offset: int, end: int) -> None:
    """tarfile takes a damaged header for the end of the archive; the true end is zeros."""
    file.seek(offset)
    rest = end - offset
    if rest < tarfile.BLOCKSIZE:
        raise DataError(f"tar {shown} is cut short, it has no end mark: copy it again")
    while rest > 0 and (piece := file.read(min(rest, 1 << 20))):
        rest -= len(piece)
        if piece.strip(b"\0"):
            raise DataError(
                f"tar {shown} is damaged, or two in one: there is more in it after {offset} bytes "
                "that is no file; pack it again"
            )


def _plain(name: str) -> str:
    """A member's name without what would lead elsewhere if it were extracted."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _hidden(name: str) -> bool:
    """Whether a file or one of its folders begins with a dot, as what macOS adds to a tar does."""
    return name.startswith(".") or "/." in name
