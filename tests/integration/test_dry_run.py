"""`--dry-run` of the shipped ImageNet recipes, on a small folder laid out like ImageNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command import MAIN_JOB, json_of
from PIL import Image

from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.weight import WeightQuantizer
from ricciq.recipe import Recipe, shipped_recipes
from ricciq.training.optim import check_training

IMAGENET = {
    name for name in shipped_recipes() if name.rpartition("-")[2] in ("w2a2", "w3a3", "w4a4")
}
PICTURES = 6


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    pixels = np.random.default_rng(0).integers(0, 256, (PICTURES, 80, 100, 3), dtype=np.uint8)
    for split in ("train", "val"):
        for number, picture in enumerate(pixels):
            path = folder / split / f"n{number % 2:08}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    return folder


def test_there_is_a_recipe_for_every_model_and_width():
    models = {name.rpartition("-")[0] for name in IMAGENET}
    assert models == {
        "resnet18",
        "resnet50",
        "mobilenetv2_100",
        "efficientnet_lite0",
        "deit_small",
        "convnext_tiny",
    }
    assert len(IMAGENET) == 3 * len(models)


@pytest.mark.parametrize("name", sorted(IMAGENET))
def test_a_recipe_is_what_its_name_says(name):
    recipe = Recipe.load(name)
    model, _, bits = name.rpartition("-")
    assert recipe.model.name.startswith(model)
    assert f"w{recipe.quantization.weight_bits}a{recipe.quantization.act_bits}" == bits
    check_training(recipe.training)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in IMAGENET if name.endswith("w2a2")))
def test_a_dry_run_shows_the_plan(imagenet, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load(name)
    line = ["quantize", recipe.model.name, "--recipe", name, "--data", imagenet]
    values = json_of(*line, "--batch-size", "2", "--dry-run")
    bits = [layer["weight_bits"] for layer in values["layers"]]
    assert bits[0] == bits[-1] == 8
    assert bits.count(2) >= 18
    assert values["steps"] == recipe.training.epochs * 2  # one picture a class is held out
    assert values["bytes"] < values["float_bytes"] / 3
    assert values["training_memory"] > 4 * values["float_bytes"] / 1.01 - values["bytes"]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_searches_no_scale_and_runs_the_converted_model_once(monkeypatch):
    searched, inputs = set(), []
    fit, quantize = WeightQuantizer._fit, ActivationQuantizer.forward

    def note_search(quantizer, rows, candidates):
        searched.add(candidates)
        return fit(quantizer, rows, candidates)

    def note_input(quantizer, x):
        inputs.append((id(quantizer), len(x)))
        return quantize(quantizer, x)

    monkeypatch.setattr(WeightQuantizer, "_fit", note_search)
    monkeypatch.setattr(ActivationQuantizer, "forward", note_input)
    values = json_of(*MAIN_JOB, "--dry-run")
    assert searched == {1}
    shared = 2  # by the first layers of the branches of a block, in two blocks
    assert len(inputs) == len(set(inputs)) + shared >= len(values["layers"])
    assert {images for _, images in inputs} == {2}
