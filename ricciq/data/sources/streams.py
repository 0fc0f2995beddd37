"""The forms hfids/NAME and tfds/NAME, which timm reads as streams: not supported."""

from __future__ import annotations

from pathlib import Path

from ricciq.data.sources.base import Parts
from ricciq.errors import DataError


def open_source(name: str, root: Path | None) -> Parts:  # noqa: ARG001
    """Refuse a stream.

    Args:
        name: hfids/NAME or tfds/NAME.
        root: ignored.

    Raises:
        DataError: always; it says what to use instead.
    """
    raise DataError(
        f"data {name!r} is a stream, whose order cannot be reproduced; use hfds/NAME, or write it "
        "as webdataset shards and use wds/NAME"
    )
