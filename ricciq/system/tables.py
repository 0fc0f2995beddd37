"""CSV files of plain rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ricciq.errors import InputError, on_one_line
from ricciq.system.files import write_atomically


def read_csv(
    path: Path, kinds: Mapping[str, Callable[[str], Any]] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """The rows `write_csv` wrote; none if the file does not exist.

    Args:
        path: of the file.
        kinds: what makes a value of the text in a column; text stays text without.

    Raises:
        InputError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("its rows are not alike")
        return [row | {key: kind(row[key]) for key, kind in kinds.items()} for row in rows]
    except (OSError, csv.Error, KeyError, ValueError) as error:
        reason = on_one_line(f"{type(error).__name__}: {error}", 160)
        raise InputError(
            f"{path} is no table that a run wrote ({reason}); restore it, or start again with "
            "--overwrite"
        ) from None


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with equal keys as a CSV file, atomically."""
    rows = list(rows)
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_atomically(path, text.getvalue())
