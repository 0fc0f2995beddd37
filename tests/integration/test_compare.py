"""A study of methods: pairs of runs, resumed run by run, and its statistics."""

import json
import math
import shutil

import numpy as np
import pytest
from command import json_of, ricciq
from scipy import stats

from ricciq.errors import (
    DivergedError,
    InterruptedRunError,
    RecipeError,
    RicciqError,
    UsageError,
)
from ricciq.recipe import Recipe
from ricciq.report.statistics import summarize
from ricciq.runs import folder as runfolder
from ricciq.runs.folder import StudyFolder, choose_run_folder
from ricciq.system.tables import read_csv
from ricciq.workflows import compare as study
from ricciq.workflows.compare import Trial, compare

pytestmark = pytest.mark.slow

RECIPE = Recipe.from_values(
    {
        "model": {"name": "digits_resnet8"},
        "data": {"name": "digits", "train_samples": 128, "batch_size": 32},
        "quantization": {"weight_bits": 2, "act_bits": 2},
        "training": {"epochs": 1},
        "device": "cpu",
    }
)
METHODS = ["ste", "ricci"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two methods and two seeds."""
    folder = tmp_path_factory.mktemp("study") / "small"
    return compare(RECIPE, METHODS, 2, folder)


def row(method, seed, top1, scale=1.0, **values):
    values = {"train_loss": 0.5, "diverged": False, **values}
    return {"method": method, "lr_scale": scale, "seed": seed, "top1": top1, **values}


def test_a_study_has_a_run_for_each_method_and_seed(finished):
    verdict, folder = finished
    rows = read_csv(folder / "rows.csv")
    assert [(r["seed"], r["method"]) for r in rows] == [
        (seed, method) for seed in ("0", "1") for method in METHODS
    ]
    assert json.loads((folder / "compare.json").read_text()) == verdict
    for name in ("seeds.png", "curves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for result in verdict["results"]:
        of_method = [float(r["top1"]) for r in rows if r["method"] == result["method"]]
        assert result["mean"] == pytest.approx(np.mean(of_method))
        assert result["divergences"] == 0
    for r in rows:
        ran = Recipe.load(folder / "trials" / f"{r['method']}-lr1-seed{r['seed']}" / "recipe.yaml")
        assert (ran.method.name, ran.seed) == (r["method"], int(r["seed"]))
        assert ran.training == RECIPE.training


def test_methods_start_alike_and_end_apart(finished):
    _, folder = finished
    first, second = (
        read_csv(folder / "trials" / f"{method}-lr1-seed0" / "summary.csv")[0] for method in METHODS
    )
    assert first["train_loss"] != second["train_loss"]
    again, _ = compare(RECIPE, ["ste", "project:strength=0"], 2, folder, resume=True)
    # That is the straight-through estimator: the same numbers to the last digit.
    assert [r["difference"] for r in again["results"]] == [0.0, 0.0]
    assert again["results"][0]["mean"] == finished[0]["results"][0]["mean"]


def test_done_runs_are_not_repeated(finished, monkeypatch):
    verdict, folder = finished
    monkeypatch.setattr(study, "train", None)
    again, _ = compare(RECIPE, METHODS, 2, folder, resume=True)
    assert again == verdict


def test_a_stopped_study_goes_on(tmp_path, monkeypatch):
    train, calls = study.train, []

    def stop_at_the_third(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(study, "train", stop_at_the_third)
    with pytest.raises(InterruptedRunError, match="--resume` continues"):
        compare(RECIPE, METHODS, 2, tmp_path / "study")
    assert not (tmp_path / "study" / "compare.json").exists()
    verdict, _ = compare(RECIPE, METHODS, 2, tmp_path / "study", resume=True)
    assert len(calls) == 5
    assert [r["seeds"] for r in verdict["results"]] == [2, 2]


def test_a_divergence_is_a_result(tmp_path, monkeypatch):
    train = study.train

    def diverge(job, session):
        if job.recipe.method.name == "ricci" and job.recipe.seed == 1:
            raise DivergedError("training gave no finite gradients")
        return train(job, session)

    monkeypatch.setattr(study, "train", diverge)
    verdict, folder = compare(RECIPE, METHODS, 2, tmp_path / "study")
    assert [r["divergences"] for r in verdict["results"]] == [0, 1]
    diverged = read_csv(folder / "rows.csv")[3]
    assert (diverged["diverged"], diverged["top1"]) == ("True", "10.0")


def test_a_full_disk_is_no_divergence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RicciqError("the disk is full")

    monkeypatch.setattr(study, "train", full)
    with pytest.raises(RicciqError, match="disk is full"):
        compare(RECIPE, METHODS, 2, tmp_path / "study")
    assert not list(tmp_path.glob("study/trials/*/result.json"))


def test_the_other_split_needs_no_training(finished, monkeypatch):
    _, folder = finished
    held, _ = compare(RECIPE, METHODS, 2, folder, split="holdout", resume=True)
    rows = read_csv(folder / "rows.csv")
    assert [r["top1"] for r in rows] == [r["holdout_top1"] for r in rows]
    monkeypatch.setattr(study, "train", None)
    for result in folder.glob("trials/ste-*/result.json"):
        row = json.loads(result.read_text())
        before = row.pop("top1")
        result.write_text(json.dumps(row))
        compare(RECIPE, METHODS, 2, folder, resume=True)
        assert json.loads(result.read_text())["top1"] == before
    assert held["split"] == "holdout"


def test_without_an_epoch_calibration_is_compared(tmp_path):
    recipe = RECIPE.override({"training.epochs": 0, "quantization.reconstruction": 20})
    verdict, _ = compare(recipe, METHODS, 2, tmp_path / "study")
    assert [r["difference"] for r in verdict["results"]] == [0, 0]
    assert [r["train_loss"] for r in verdict["results"]] == [None, None]


def test_an_error_of_another_kind_ends_the_study(tmp_path):
    lost = RECIPE.override({"data.train_samples": 10**6})
    with pytest.raises(UsageError, match="train_samples"):
        compare(lost, METHODS, 2, tmp_path / "study")


def test_the_statistics_are_those_of_paired_students():
    values = {"ste": [90.0, 91.0, 90.5, 92.0], "ricci": [90.4, 91.1, 91.0, 92.1]}
    rows = [row(m, seed, v) for m, column in values.items() for seed, v in enumerate(column)]
    first, second = summarize(rows, ["ste", "ricci"], [1.0])
    assert (first["difference"], first["low"], first["high"]) == (0, 0, 0)
    expected = stats.ttest_rel(values["ricci"], values["ste"]).confidence_interval(0.95)
    assert (second["low"], second["high"]) == pytest.approx(tuple(expected))
    assert second["difference"] == pytest.approx(0.275)
    assert second["std"] == pytest.approx(np.std(values["ricci"], ddof=1))


def test_what_a_rate_costs_is_counted_to_the_first_rate():
    rows = [row("ste", seed, 90.0 - 5 * (scale - 1), scale) for seed in (0, 1) for scale in (1, 3)]
    rows += [
        row("ricci", seed, 91.0 - (scale - 1), scale, train_loss=None)
        for seed in (0, 1)
        for scale in (1, 3)
    ]
    results = list(summarize(rows, ["ste", "ricci"], [1, 3]))
    assert [r["drop"] for r in results] == [0, 0, 10, 2]
    assert [r["difference"] for r in results] == [0, 1, 0, 9]
    assert [r["train_loss"] for r in results] == [0.5, None, 0.5, None]


def test_a_trial_changes_method_rate_and_seed_only():
    base = RECIPE.override({"method.name": "ricci", "method.rho": 0.5})
    trial = Trial("ricci:block=9:time=0.05:correction=natural", 3.0, 7)
    recipe = trial.recipe(base)
    changes = {"rho": 0.5, "block": 9, "time": 0.05, "correction": "natural"}
    assert recipe.method.changes == changes
    assert math.isclose(recipe.training.lr, 3 * base.training.lr)
    assert recipe.seed == 7
    assert Trial("ste", 1.0, 7).recipe(base).method.changes == {}
    assert trial.name == "ricci_block=9_time=0.05_correction=natural-lr3-seed7"


@pytest.mark.parametrize("key", ["target", "on", "method.target", "method.on"])
def test_a_trial_takes_a_target_under_its_old_name_too(key):
    base = RECIPE.override({"method.target": "both", "method.rho": 0.5})
    method = Trial(f"ricci:{key}=weights:correction=pullback", 1.0, 0).recipe(base).method
    assert method.corrects == "weights"
    assert method.changes == {"rho": 0.5, "correction": "pullback"}


def test_a_trial_with_two_targets_is_refused():
    with pytest.raises(RecipeError, match="its old name, differ"):
        Trial("ricci:on=weights:target=both", 1.0, 0).recipe(RECIPE)


BAD = ["stee", "ste:rho=0.5", "ricci:", "ricci:rho=2", "ricci:tim=1", "ricci:block=[", "ste:name=x"]


@pytest.mark.parametrize("method", BAD)
def test_a_method_that_does_not_hold_is_refused_before_anything_runs(tmp_path, method):
    with pytest.raises(RecipeError, match="method"):
        compare(RECIPE, ["ste", method], 2, tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("methods", "seeds", "scales", "words"),
    [
        (["ste"], 2, [1.0], "--methods ste leaves nothing to compare"),
        (["ste", "ste"], 2, [1.0], "--methods ste,ste leaves nothing to compare"),
        (METHODS, 1, [1.0], "--seeds 1"),
        (METHODS, 2, [1.0, 0.0], "--lr-scales"),
        (METHODS, 2, [math.inf], "--lr-scales"),
        (METHODS, 2, [1, 1.0000001], "--lr-scales 1,1 are not different"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, methods, seeds, scales, words):
    with pytest.raises(UsageError, match=words):
        compare(RECIPE, methods, seeds, tmp_path / "study", lr_scales=scales)


def test_a_folder_is_replaced_only_on_demand(finished, tmp_path):
    _, folder = finished
    with pytest.raises(UsageError, match="--overwrite"):
        compare(RECIPE, METHODS, 2, folder)
    with pytest.raises(UsageError, match="another recipe"):
        compare(RECIPE.override({"seed": 5}), METHODS, 2, folder, resume=True)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not a run of ricciq"):
        compare(RECIPE, METHODS, 2, tmp_path, overwrite=True)


def test_an_overwritten_study_leaves_what_is_not_its_own(finished, tmp_path, monkeypatch):
    _, folder = finished
    copied = tmp_path / "study"
    shutil.copytree(folder, copied)
    (copied / "trials" / "notes.txt").write_text("mine")
    monkeypatch.setattr(study, "_judged", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(RECIPE, METHODS, 2, copied, overwrite=True)
    left = {path.name for path in copied.iterdir()}
    assert left == {".lock", "study.yaml", "log.txt", "trials"}
    assert [path.name for path in (copied / "trials").iterdir()] == ["notes.txt"]


def test_a_study_is_no_run_and_a_run_no_study(finished, monkeypatch):
    _, folder = finished
    with pytest.raises(UsageError, match="not a run of ricciq"):
        choose_run_folder(RECIPE, folder, resume=False, overwrite=True)
    monkeypatch.setattr(runfolder, "RUNS", folder.parent)
    with pytest.raises(UsageError, match="no unfinished run"):
        choose_run_folder(RECIPE, None, resume=True, overwrite=False)
    found = choose_run_folder(RECIPE, None, resume=True, overwrite=False, kind=StudyFolder)
    assert found.path == folder


def test_the_command_shows_a_table_or_json(finished, tmp_path):
    _, folder = finished
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.to_yaml())
    arguments = ["compare", "digits_resnet8", "--recipe", str(recipe), "--methods", "ste,ricci"]
    arguments += ["--seeds", "2", "--output", str(folder), "--resume"]
    assert [r["method"] for r in json_of(*arguments)["results"]] == METHODS
    assert "minus ste" in ricciq(*arguments).out
    for wrong, code in [(["--split", "test"], 2), (["--lr-scales", "much"], 2)]:
        assert ricciq(*arguments, *wrong).code == code
