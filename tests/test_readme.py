"""The README's commands and its Python, taken from the page itself."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from command import check_command

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    called = [part for line in lines for part in line.split(" && ")]
    return [shlex.split(part, comments=True) for part in called if part.startswith("ricciq ")]


def test_the_page_begins_with_the_two_set_up_commands() -> None:
    first, second = blocks("bash")[:2]
    main_job = "ricciq quantize digits_resnet8 --data digits --bits 2"
    assert first.strip() == f"pip install . && {main_job}"
    assert second.strip().startswith("pip install '.[test]' && ")
    assert second.strip().endswith("pytest")
    assert README.count("pip install") == 2


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_names_verbs_options_and_recipes_that_exist(command: list[str]) -> None:
    check_command(command)


def test_the_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert len(list((tmp_path / "runs").glob("*-digits_resnet8-w2a2/model.onnx"))) == 1
    assert "model.onnx" in capsys.readouterr().out
