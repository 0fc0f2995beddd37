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
    """Read the rows of a file that `write_csv` wrote; none if it does not exist.

    Args:
        path: of the file.
        kinds: by column, the function that converts its text; other columns stay text.

    Raises:
        InputError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("its rows differ in length")
        return [row | {key: kind(row[key]) for key, kind in kinds.items()} for row in rows]
    except (OSError, csv.Error, KeyError, ValueError) as error:
        reason = on_one_line(f"{type(error).__name__}: {error}", 160)
        raise InputError(
            f"{path} is not a table that a run wrote ({reason}); restore it, or start again with "
            "--overwrite"
        ) from None


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a CSV file, atomically.

    Args:
        path: of the file.
        rows: mappings with equal keys.
    """
    rows = list(rows)
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_atomically(path, text.getvalue())
