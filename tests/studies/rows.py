"""The rows that a study writes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

FIELDS = ("setting", "method", "opt", "seed", "judged_on", "top1", "loss", "train_loss", "seconds")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a CSV file, with all of `FIELDS`."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
