"""Atomic writing of files, and temporary folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from ricciq.errors import RicciqError


@contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Replace a file atomically: a block writes a temporary file, which then takes its place.

    If the block fails, the file is left unchanged.

    Args:
        path: the file to replace.
        previous: path to rename the old file to; None discards it.

    Yields:
        The path of the temporary file, for the block to write.

    Raises:
        RicciqError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        if previous is not None and path.is_file():
            path.replace(previous)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RicciqError(
            f"cannot write {path} ({error}); free some space or choose another --output"
        ) from None
    finally:
        with suppress(OSError):  # it is gone, unless something above failed
            temporary.unlink()


@contextmanager
def scratch_folder(place: Path | None = None) -> Iterator[Path]:
    """A temporary folder for the duration of a block.

    Args:
        place: the folder to make it in; by default TMPDIR.

    Yields:
        Its path.

    Raises:
        RicciqError: it cannot be made.
    """
    try:
        made = TemporaryDirectory(prefix=".scratch-", dir=place)
    except OSError as error:
        raise RicciqError(
            f"no temporary folder can be made ({error}); make room, or set TMPDIR to a folder on "
            "another disk"
        ) from None
    with made as name:
        yield Path(name)


def _sync_folder(folder: Path) -> None:
    """Make a renaming survive a power failure, on systems where a folder can be synced."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_atomically(path: Path, data: bytes | str, previous: Path | None = None) -> None:
    """Replace a file by new content, atomically.

    Args:
        path: the file to write.
        data: its content; text is encoded as UTF-8.
        previous: path to rename the old file to; None discards it.

    Raises:
        RicciqError: the disk is full or the folder cannot be written.
    """
    with replacing(path, previous) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
