"""The study's figures in the README are those of its rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STUDY = Path(__file__).parent / "study"
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_the_table_of_the_confirmation() -> None:
    command = [sys.executable, str(STUDY / "table.py"), str(STUDY / "confirmed.csv")]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(table.splitlines()) > 10
    assert table in README
