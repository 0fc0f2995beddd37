"""`ricciq recipes`: list, show, copy, check."""

from __future__ import annotations

import json

import pytest
from command import ricciq

from ricciq.recipe import Recipe, shipped_recipes


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_all_shipped_recipes_are_listed(monkeypatch):
    rows = json.loads(ricciq("recipes", "ls", "--json").out)["recipes"]
    assert [row["name"] for row in rows] == list(shipped_recipes())
    (row,) = (row for row in rows if row["name"] == "digits-float")
    assert row == {
        "name": "digits-float",
        "model": "digits_resnet8",
        "weight_bits": 32,
        "act_bits": 32,
        "data": "digits",
        "epochs": 40,
    }
    monkeypatch.setenv("COLUMNS", "40")
    assert all(name in ricciq("recipes", "ls").out for name in shipped_recipes())


def test_a_recipe_is_shown_as_it_is_written(tmp_path):
    text = shipped_recipes()["fashion-low"].read_text()
    assert ricciq("recipes", "show", "fashion-low") == (0, text, "")
    (tmp_path / "mine.yaml").write_text("# mine\nseed: 3\n")
    assert ricciq("recipes", "show", "mine.yaml").out == "# mine\nseed: 3\n"
    (tmp_path / "page.html").write_bytes(b"\xff\x1b[2J")
    answer = ricciq("recipes", "show", "page.html")
    assert (answer.code, answer.out) == (2, "")


def test_a_copy_goes_where_it_is_asked_and_replaces_nothing_unasked(tmp_path):
    source = shipped_recipes()["fashion-low"].read_bytes()
    assert "would write fashion-low.yaml" in ricciq("recipes", "cp", "fashion-low", "--dry-run").out
    assert list(tmp_path.iterdir()) == []
    assert ricciq("recipes", "cp", "fashion-low").code == 0
    assert (tmp_path / "fashion-low.yaml").read_bytes() == source
    (tmp_path / "fashion-low.yaml").write_text("# changed")
    for more in ([], ["--dry-run"]):
        refused = ricciq("recipes", "cp", "fashion-low", *more)
        assert refused.code == 2
        assert "fashion-low.yaml exists already; give --overwrite" in refused.err
    assert (tmp_path / "fashion-low.yaml").read_text() == "# changed"
    assert ricciq("recipes", "cp", "fashion-low", "--overwrite").code == 0
    assert (tmp_path / "fashion-low.yaml").read_bytes() == source
    assert ricciq("recipes", "cp", "fashion-low", "mine.yaml").code == 0
    assert Recipe.load("mine.yaml") == Recipe.load("fashion-low")
    (tmp_path / "folder").mkdir()
    assert ricciq("recipes", "cp", "fashion-low", "folder").code == 0
    assert (tmp_path / "folder" / "fashion-low.yaml").read_bytes() == source
    refused = ricciq("recipes", "cp", "fashion-low", "no/such/folder/x.yaml")
    assert refused.code == 2
    assert "there is no folder no/such/folder; create it" in refused.err
    for target in ("x" * 300, "y" * 5000 + ".yaml"):
        assert ricciq("recipes", "cp", "fashion-low", target).code == 2
    (tmp_path / "none.yaml").write_bytes(b"\xff\x00")
    assert ricciq("recipes", "cp", "none.yaml", "z.yaml").code == 2
    assert not (tmp_path / "z.yaml").exists()


def test_all_recipes_are_checked_and_invalid_ones_are_reported(tmp_path):
    assert ricciq("recipes", "check", *shipped_recipes()).code == 0
    (tmp_path / "key.yaml").write_text("training: {epoch: 3}\n")
    (tmp_path / "method.yaml").write_text("method: {name: dsq, rho: 0.5}\n")
    (tmp_path / "opt.yaml").write_text("training: {opt: sgdd}\n")
    (tmp_path / "aa.yaml").write_text("data: {augmentation: {auto_augment: nope}}\n")
    assert ricciq("recipes", "check", "aa.yaml").code == 2
    answer = ricciq(
        "recipes", "check", "key.yaml", "digits-float", "method.yaml", "opt.yaml", "none"
    )
    assert answer.code == 2
    assert answer.out.splitlines() == [
        "key.yaml is invalid",
        "digits-float is valid",
        "method.yaml is invalid",
        "opt.yaml is invalid",
        "none is invalid",
    ]
    (sentence,) = answer.err.splitlines()
    for words in (
        "epoch; did you mean training.epochs",
        "dsq has no rho",
        "sgdd",
        "no recipe none",
    ):
        assert words in sentence
    answer = ricciq("recipes", "check", "digits-float", "key.yaml", "--json")
    good, bad = json.loads(answer.out)["recipes"]
    assert answer.code == 2
    assert good == {"recipe": "digits-float", "error": None}
    assert answer.err == f"ricciq: {bad['error']}\n"
