"""A run by a path in it, and the newest finished one."""

import os
from pathlib import Path

import pytest

from ricciq.errors import InputError, UsageError
from ricciq.recipe import Recipe
from ricciq.runs.find import newest_finished, onnx_file_of, run_of
from ricciq.runs.folder import RunFolder, StudyFolder

RECIPE = Recipe().override({"model.name": "resnet18"})


def make_run(path: Path, finished_at: int | None, kind: type[RunFolder] = RunFolder) -> RunFolder:
    folder = kind(path)
    with folder.locked():
        folder.begin(RECIPE)
    if finished_at is not None:
        folder.report.write_text("{}")
        os.utime(folder.report, (finished_at, finished_at))
    return folder


def test_the_newest_run_is_the_one_that_finished_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs", "20260103-000000-c"), None)
    make_run(Path("runs", "20260102-000000-b"), 200)
    make_run(Path("runs", "mine"), 300)
    make_run(Path("runs", "20260104-000000-a"), 100)
    make_run(Path("runs", "20260105-000000-study"), 400, StudyFolder)
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    assert newest_finished().path == Path("runs", "mine")


@pytest.mark.parametrize("unfinished", [False, True])
def test_without_a_finished_run_one_has_to_be_named(tmp_path, monkeypatch, unfinished):
    monkeypatch.chdir(tmp_path)
    if unfinished:
        make_run(Path("runs", "x"), None)
    with pytest.raises(UsageError, match=r"no finished run in .*runs; name a run"):
        newest_finished()


def test_every_path_into_a_run_names_it(tmp_path):
    folder = make_run(tmp_path / "run", 1)
    for path in (folder.onnx, folder.best, folder.float_onnx):
        path.write_text("x")
        assert run_of(path).path == folder.path
    assert run_of(folder.path).path == folder.path
    assert run_of(tmp_path / "missing").path == tmp_path / "missing"


def test_the_onnx_file_of_a_path(tmp_path):
    folder = make_run(tmp_path / "run", None)
    for path in (folder.path, folder.best):
        with pytest.raises(InputError, match=r"has no model\.onnx yet; finish it with --resume"):
            onnx_file_of(path)
    folder.onnx.write_text("x")
    for path in (folder.path, folder.best, folder.onnx):
        assert onnx_file_of(path) == folder.onnx
    assert onnx_file_of(folder.float_onnx) == folder.float_onnx
    assert onnx_file_of(tmp_path / "missing.onnx") == tmp_path / "missing.onnx"
    with pytest.raises(InputError, match="is not the folder of a run"):
        onnx_file_of(tmp_path)
    with pytest.raises(InputError, match="is not the folder of a run"):
        onnx_file_of(tmp_path / "weights.safetensors")
