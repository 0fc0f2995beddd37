"""The catalogue of sources: every entry works, and help and errors are made of it."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from command import ricciq

from ricciq.data.open import open_data
from ricciq.data.sources import catalog
from ricciq.data.sources.base import ImageArrays, Parts
from ricciq.data.sources.catalog import SOURCES, Source, find_source, forms
from ricciq.errors import DataError, UsageError

USABLE = catalog.usable()
HELPERS = {"__init__", "base", "catalog", "files", "tar"}


def modules() -> set[str]:
    return {path.stem for path in Path(catalog.__file__).parent.glob("*.py")} - HELPERS


def test_every_module_of_the_package_is_in_the_catalogue_and_the_other_way_round() -> None:
    assert {source.module for source in SOURCES} == modules()


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_source_opens_with_a_name_and_a_root(name: str) -> None:
    module = import_module(f"ricciq.data.sources.{name}")
    assert list(signature(module.open_source).parameters) == ["name", "root"]
    assert module.__doc__


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.form)
def test_a_source_takes_its_own_names_only(source: Source, tmp_path: Path) -> None:
    name = str(tmp_path) if source.is_path else source.form
    assert find_source(name) is source
    assert sum(other.takes(name) for other in SOURCES) == 1


@pytest.mark.parametrize("name", ["torch", "torch/", "wds/", "hfds/", "digits/a", "nowhere/at/all"])
def test_names_that_no_source_takes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_source(name) is None


def test_a_source_goes_before_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert open_data("digits", None).num_classes == 10


@pytest.mark.parametrize("source", USABLE, ids=lambda source: source.form)
def test_help_and_errors_name_every_source(source: Source) -> None:
    shown = " ".join(ricciq("quantize", "--help").out.replace("│", " ").split())
    with pytest.raises(DataError) as error:
        open_data("nowhere/at/all", None)
    assert source.form in str(error.value)
    assert source.form[1:] in shown  # help begins with a capital
    assert source.help in shown
    assert source.root in shown.lower()


@pytest.mark.parametrize("source", [s for s in USABLE if s.needs_root], ids=lambda s: s.form)
def test_a_source_that_needs_a_root_says_so(source: Source) -> None:
    with pytest.raises(UsageError, match=r"^data '.*' needs --data-dir; give the folder"):
        open_data(source.form, None)


def test_the_forms_are_a_list_in_words() -> None:
    assert forms() == (
        "a folder with train/ and val/ (or valid/, validation/), `digits`, torch/NAME or wds/NAME "
        "with --data-dir, or hfds/NAME"
    )


def test_a_source_is_added_by_a_module_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_source(name: str, root: Path | None) -> Parts:
        assert (name, root) == ("stripes/two", None)
        part = ImageArrays(np.zeros((4, 8, 8, 1), np.uint8), [0, 0, 1, 1])
        return Parts(["up", "across"], part, part)

    module = ModuleType("ricciq.data.sources.stripes")
    module.open_source = open_source  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    added = Source("stripes", "stripes/NAME", "images of stripes")
    monkeypatch.setattr(catalog, "SOURCES", (*SOURCES, added))
    assert open_data("stripes/two", None).class_names == ["up", "across"]
    assert forms().endswith("hfds/NAME, or stripes/NAME")
    assert catalog.data_help().endswith("; stripes/NAME: images of stripes.")


def test_the_catalogue_imports_nothing_but_the_standard_library() -> None:
    code = (
        "import sys, ricciq.data.sources.catalog\n"
        "heavy = {'torch', 'timm', 'numpy', 'PIL', 'pydantic', 'datasets', 'sklearn'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
