"""Shell completion, called as bash calls it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ricciq.cli import completion

ASK = """
import sys
sys.argv = ["ricciq"]
from ricciq.cli import main
try:
    main()
finally:
    print("timm" in sys.modules, file=sys.stderr)
"""


def tab(line: str, cache: object) -> tuple[list[str], bool]:
    """The words offered for the last one of a line, and whether timm was imported for them."""
    words = line.split(" ")
    asked = {
        "_RICCIQ_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "XDG_CACHE_HOME": str(cache),
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr in ("True\n", "False\n")
    return done.stdout.split(), done.stderr == "True\n"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_timm_is_asked_for_its_models_once(cache):
    names, imported = tab("ricciq quantize resnet50", cache)
    assert imported
    assert {"resnet50", "resnet50.a1_in1k", "resnet50d"} <= set(names)
    (kept,) = (cache / "ricciq").iterdir()
    assert kept.name.startswith("models-timm-")
    names, imported = tab("ricciq compare digits_", cache)
    assert not imported
    assert names == ["digits_resnet8", "digits_resnet8.ricciq"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ricciq quantize m --recipe digits", ["digits-float", "digits-low"]),
        ("ricciq quantize m --method l", ["lne"]),
        ("ricciq compare m --methods ste,ri", ["ste,ricci"]),
        ("ricciq quantize m --device c", ["cpu", "cuda"]),
        ("ricciq quantize m --bits t", ["ternary"]),
        ("ricciq quantize m --act-bits 3", ["3", "32"]),
        ("ricciq export run --format q", ["qdq"]),
        ("ricciq export run --input u", ["uint8"]),
        ("ricciq compare m --split h", ["holdout"]),
        ("ricciq recipes show fashion-l", ["fashion-low"]),
        ("ricciq recipes check a fashion-l", ["fashion-low"]),
        ("ricciq rec", ["recipes"]),
        ("ricciq quantize m --quie", ["--quiet"]),
        ("ricciq quantize m --method zzz", []),
    ],
)
def test_other_names_are_offered_without_timm(cache, line, offered):
    assert tab(line, cache) == (offered, False)


def test_names_are_offered_without_a_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "digits_resnet8" in completion.model_names()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_completion_that_fails_offers_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it now raises
    assert completion.one_of(completion.model_names)("resnet") == []
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_the_script_for_a_shell_is_shown():
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = ['ricciq']\n{SHOW}"],
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_RICCIQ_COMPLETE=complete_bash" in done.stdout


SHOW = "from ricciq.cli import main; main(['--show-completion', 'bash'])"
