"""The figures of the study's page are those of its rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parent.parent / "studies"
UNIFORM = "ricci:quantization.weight_bits=2,ricci:quantization.weight_bits=3"
PAGE = (STUDY / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments",
    [
        ["confirmed.csv"],
        ["second.csv"],
        ["ablations.csv", "--across"],
        ["techniques.csv", "--across", "--first", "ricci"],
        ["bits.csv", "--across", "--first", UNIFORM],
        ["brevitas.csv", "--first", "brevitas"],
        ["brevitas_own.csv", "--recipes", "--first", "brevitas, without a teacher"],
        ["distillation.csv", "--first", "ricci:training.distill=0.5"],
        ["new_head.csv", "--first", "labels alone"],
        ["sensitivity.csv", "--first", "measured"],
        ["schedule.csv", "--first", "plain defaults"],
    ],
    ids=" ".join,
)
def test_the_page_has_the_table_of_the_rows(arguments: list[str]) -> None:
    command = [sys.executable, "table.py", *arguments]
    table = subprocess.run(command, cwd=STUDY, capture_output=True, text=True, check=True).stdout
    assert len(table.splitlines()) > 2
    assert table in PAGE
