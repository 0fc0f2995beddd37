"""The folder of a session: where another run takes it, the next one is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from ricciq.errors import FolderTakenError, InterruptedRunError
from ricciq.recipe import Recipe
from ricciq.runs import folder
from ricciq.workflows.session import Session

RECIPE = Recipe.from_values({"model": {"name": "m"}, "data": {"name": "digits"}, "device": "cpu"})


def test_of_two_runs_in_one_second_each_names_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder, "default_folder", lambda *_: folder.RUNS / "now")

    def run_and_stop(first: Session) -> None:
        with Session.open(RECIPE) as second:
            assert first.folder.path == second.folder.path == Path("runs/now")
            first.begin(RECIPE)
            second.begin(RECIPE)
            assert second.folder.path == Path("runs/now-2")
            raise KeyboardInterrupt

    with Session.open(RECIPE) as first:
        with pytest.raises(InterruptedRunError, match="--output runs/now-2 --resume"):
            run_and_stop(first)
        assert first.folder.path == Path("runs/now")


def test_a_folder_that_was_named_is_not_exchanged(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with Session.open(RECIPE, output) as first, Session.open(RECIPE, output) as second:
        first.begin(RECIPE)
        with pytest.raises(FolderTakenError, match="in use by another run"):
            second.begin(RECIPE)
