"""Run folders: names, locks, resuming, and refusal of other folders."""

import math
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from ricciq.errors import InputError, UsageError
from ricciq.recipe import Recipe
from ricciq.runs import folder as runfolder
from ricciq.runs.folder import RunFolder, choose_run_folder, default_folder
from ricciq.system.tables import read_csv, write_csv

RECIPE = Recipe().override({"model.name": "resnet18"})
OTHER = RECIPE.override({"training.lr": 0.5})


def choose(output: Path | None, *, recipe=RECIPE, resume=False, overwrite=False) -> Path:
    return choose_run_folder(recipe, output, resume=resume, overwrite=overwrite).path


def make_run(path: Path, recipe=RECIPE, *, finished=False) -> RunFolder:
    folder = RunFolder(path)
    with folder.locked():
        folder.begin(recipe)
        if finished:
            folder.report.write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("model", "weight_bits", "name"),
    [
        ("resnet18", 2, "20260102-030405-resnet18-w2a3"),
        ("resnet18.a1_in1k", "ternary", "20260102-030405-resnet18.a1_in1k-wta3"),
        ("hf-hub:timm/x", 4, "20260102-030405-hf-hub_timm_x-w4a3"),
    ],
)
def test_the_default_name_says_when_what_and_how_wide(model, weight_bits, name):
    recipe = Recipe().override(
        {
            "model.name": model,
            "quantization.weight_bits": weight_bits,
            "quantization.act_bits": 3,
        }
    )
    assert default_folder(recipe, datetime(2026, 1, 2, 3, 4, 5)) == Path("runs") / name


def test_a_new_or_empty_folder_is_accepted_and_not_made(tmp_path):
    assert choose(tmp_path) == tmp_path
    assert choose(tmp_path / "new") == tmp_path / "new"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_of_other_files_is_refused(tmp_path, flags):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not a run of ricciq"):
        choose(tmp_path, **flags)
    with pytest.raises(UsageError, match=r"thesis\.tex is a file; give a folder"):
        choose(tmp_path / "thesis.tex", **flags)


def test_a_name_the_file_system_refuses_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--output"):
        choose(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("finished", "remedy"), [(True, "give --overwrite"), (False, "give --resume or --overwrite")]
)
def test_a_run_is_replaced_only_on_demand(tmp_path, finished, remedy):
    make_run(tmp_path, finished=finished)
    with pytest.raises(UsageError, match=f"already has a run; {remedy}$"):
        choose(tmp_path)
    assert choose(tmp_path, overwrite=True) == tmp_path


def test_a_run_that_could_not_begin_is_no_obstacle(tmp_path):
    with RunFolder(tmp_path).locked():
        pass
    assert any(tmp_path.iterdir())  # its lock
    assert choose(tmp_path) == tmp_path


def test_begin_removes_a_runs_own_files_only(tmp_path):
    folder = make_run(tmp_path, finished=True)
    large = tmp_path / "float.onnx.data"
    for path in (folder.last, folder.best, folder.onnx, folder.summary, folder.log, large):
        path.write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "plots").mkdir()
    folder.begin(OTHER)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".lock", "recipe.yaml", "notes.txt", "plots"}
    assert folder.load_recipe() == OTHER
    assert folder.is_ours
    assert not folder.is_finished


def test_begin_says_what_it_cannot_remove(tmp_path):
    folder = make_run(tmp_path)
    folder.onnx.mkdir()
    with pytest.raises(UsageError, match=r"cannot be cleared .*model\.onnx"):
        folder.begin(RECIPE)


def test_a_run_is_resumed_with_its_own_recipe_only(tmp_path):
    make_run(tmp_path)
    assert choose(tmp_path, resume=True) == tmp_path
    with pytest.raises(UsageError, match=r"another recipe \(.* was .* and is .*\)"):
        choose(tmp_path, recipe=OTHER, resume=True)


def test_nothing_to_resume_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="has no run to resume"):
        choose(tmp_path, resume=True)
    with pytest.raises(UsageError, match="no unfinished run of this recipe in runs"):
        choose(None, resume=True)
    make_run(tmp_path / "done", finished=True)
    with pytest.raises(UsageError, match="is finished"):
        choose(tmp_path / "done", resume=True)


def test_the_newest_unfinished_run_of_the_recipe_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = runfolder.RUNS
    make_run(runs / "20260101-000000-a")
    make_run(runs / "20260102-000000-a")
    make_run(runs / "20260103-000000-a", OTHER)
    make_run(runs / "20260104-000000-a", finished=True)
    make_run(runs / "20260105-000000-a").recipe.write_text("damaged")
    (runs / "20260106-000000-a").mkdir()
    assert choose(None, resume=True) == runs / "20260102-000000-a"
    assert choose(None, recipe=OTHER, resume=True) == runs / "20260103-000000-a"


def test_a_folder_without_a_recipe_is_no_run(tmp_path):
    with pytest.raises(InputError, match="is not the folder of a run"):
        RunFolder(tmp_path).load_recipe()


HOLD = """
import sys, ricciq.runs.folder as r, pathlib
with r.RunFolder(pathlib.Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_folder_in_use_by_another_process_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="in use by another run"), folder.locked():
            pass
        other.communicate("\n")
    with folder.locked():  # free again
        assert folder.path.is_dir()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="cannot be written"),
        RunFolder(tmp_path / "file" / "run").locked(),
    ):
        pass


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [
        {"epoch": 1, "layer": 'a,"b"\nc', "loss": 1 / 3, "note": None},
        {"epoch": 2, "layer": "", "loss": math.inf, "note": "é"},
    ]
    write_csv(tmp_path / "x.csv", rows)
    back = read_csv(tmp_path / "x.csv")
    assert [list(row) for row in back] == [list(row) for row in rows]
    assert [float(row["loss"]) for row in back] == [1 / 3, math.inf]
    assert [row["layer"] for row in back] == ['a,"b"\nc', ""]
    assert [row["note"] for row in back] == ["", "é"]


def test_no_rows_and_no_file_are_no_rows(tmp_path):
    write_csv(tmp_path / "x.csv", [])
    assert read_csv(tmp_path / "x.csv") == read_csv(tmp_path / "none.csv") == []


def test_a_run_is_resumed_with_any_number_of_workers(tmp_path):
    make_run(tmp_path, RECIPE.override({"data.workers": 0}))  # as version 0.1.0 wrote it
    assert choose(tmp_path, resume=True) == tmp_path
    assert choose(tmp_path, recipe=RECIPE.override({"data.workers": 4}), resume=True) == tmp_path
    with pytest.raises(UsageError, match="another recipe"):
        choose(tmp_path, recipe=OTHER, resume=True)
