"""The forms hfids/NAME and tfds/NAME, which timm reads as streams: refused, with what to do."""

from __future__ import annotations

from pathlib import Path

from ricciq.data.sources.base import Parts
from ricciq.errors import DataError


def open_source(name: str, root: Path | None) -> Parts:  # noqa: ARG001
    """Refuse a stream.

    Raises:
        DataError: always.
    """
    raise DataError(
        f"data {name!r} would come as a stream, which has no order that can be repeated: use "
        "hfds/NAME, or write it as webdataset shards and use wds/NAME"
    )
