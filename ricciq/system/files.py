"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ricciq.errors import RicciqError


@contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Replace a file by what a block writes to the path it is given, or leave it as it was.

    Args:
        path: of the file.
        previous: what it is renamed to, if it is to be kept.

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
        with suppress(OSError):  # gone already, unless something above failed
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make renamings last through a power failure, where folders can be opened for that."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_atomically(path: Path, data: bytes | str, previous: Path | None = None) -> None:
    """Replace a file by new content, or leave it as it was; the rest is as in `replacing`."""
    with replacing(path, previous) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
