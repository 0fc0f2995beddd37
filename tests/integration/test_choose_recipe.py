"""Which recipe `quantize` takes when none is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command import json_of, ricciq

from ricciq.cli.request import requested_recipe
from ricciq.recipe import Recipe, shipped_recipes
from ricciq.workflows import choose_recipe as module
from ricciq.workflows.choose_recipe import choose_recipe


def request(*, model: str = "digits_resnet8", name: str | None = None, bits: str = "4", **flags):
    widths = (bits, None, None, None)
    return requested_recipe(model, None, name, widths, {"data.name": "digits", **flags})


class Counted:
    """Data of which only the numbers matter."""

    labelled = True

    def __init__(self, classes: int, images: int) -> None:
        self.num_classes, self.images = classes, images

    def count(self, split: str) -> int:
        return {"fit": self.images - self.images // 20, "holdout": self.images // 20}[split]

    def hold_out(self, share: float) -> None:
        pass


def chosen(monkeypatch: pytest.MonkeyPatch, model: str, bits: int, data: Counted):
    monkeypatch.setattr(module, "open_data", lambda *_: data)
    keys = {"quantization.weight_bits": bits, "quantization.act_bits": bits}
    return choose_recipe(Recipe().override({"model.name": model, "data.name": "x", **keys}))


@pytest.mark.parametrize("model", ["resnet50", "resnet50.a1_in1k", "resnet50.tv_in1k"])
def test_a_shipped_recipe_is_taken_for_data_of_its_kind(monkeypatch, model: str) -> None:
    choice = chosen(monkeypatch, model, 2, Counted(1000, 1_281_167))
    assert choice.recipe == Recipe.load("resnet50-w2a2")
    assert choice.reason.startswith("recipe resnet50-w2a2 fits: it was written for 1000 classes")


@pytest.mark.parametrize(
    ("model", "bits", "classes", "images"),
    [
        ("resnet50", 2, 1000, 13_000),
        ("resnet50", 2, 37, 1_281_167),
        ("resnet50", 5, 1000, 1_281_167),
        ("resnet50d", 2, 1000, 1_281_167),
        ("resnet34", 2, 1000, 1_281_167),
    ],
)
def test_for_anything_else_a_schedule_is_derived(
    monkeypatch, model: str, bits: int, classes: int, images: int
) -> None:
    choice = chosen(monkeypatch, model, bits, Counted(classes, images))
    assert choice.reason.startswith(f"schedule for {images - images // 20} images")
    assert choice.recipe.model.name == ""
    assert choice.recipe.training.opt == "adamw"


def test_every_recipe_for_imagenet_says_for_what_it_was_written() -> None:
    for name, file in shipped_recipes().items():
        recipe = Recipe.load(file)
        if not recipe.data.name:
            assert recipe.written_for.classes == 1000, name


def test_options_come_before_what_is_derived() -> None:
    usual, asked = request(), request(**{"training.epochs": 3, "training.lr": 0.5})
    assert usual.recipe.training.epochs > 20
    assert usual.messages[-1].startswith("schedule for 1365 images and a network of kind batchnorm")
    assert f"epochs {usual.recipe.training.epochs}" in usual.messages[-1]
    assert (asked.recipe.training.epochs, asked.recipe.training.lr) == (3, 0.5)
    assert "epochs" not in asked.messages[-1]
    assert asked.data is not None
    assert asked.data.count("fit") == 1365


def test_the_plain_defaults_and_a_name_choose_nothing() -> None:
    plain = request(name="none")
    assert plain.recipe.training == Recipe().training
    assert (plain.messages, plain.data) == ([], None)
    assert request(name="digits-float", bits="32").recipe.model.pretrained is False
    assert request(bits="32").recipe.model.pretrained is True


def test_a_run_says_and_records_what_it_took(tmp_path: Path) -> None:
    answer = ricciq(
        *("quantize", "digits_resnet8", "--data", "digits", "--bits", "8", "--epochs", "0"),
        *("--output", tmp_path / "run"),
    )
    assert answer.code == 0, answer.err
    assert "schedule for 1365 images" in answer.err.splitlines()[0]
    recorded = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recorded["training"]["lr"] == request(bits="8").recipe.training.lr


def test_a_misspelt_none_is_one_sentence() -> None:
    answer = ricciq("quantize", "digits_resnet8", "--data", "digits", "--recipe", "nonne")
    assert answer.code == 2
    assert answer.err == "ricciq: there is no recipe nonne; did you mean none\n"


def test_a_dry_run_shows_the_schedule() -> None:
    plan = json_of("quantize", "digits_resnet8", "--data", "digits", "--bits", "4", "--dry-run")
    assert (
        plan["epochs"] == plan["recipe"]["training"]["epochs"] == request().recipe.training.epochs
    )
