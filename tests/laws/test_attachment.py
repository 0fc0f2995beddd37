"""Estimators are attached to a model for the duration of training, and leave nothing on it."""

from __future__ import annotations

import pytest
import torch
from digits_run import RECIPE, Run

from ricciq.errors import CheckpointError, RecipeError
from ricciq.estimators.apply import Attachment, Correction
from ricciq.estimators.catalog import CATALOG
from ricciq.estimators.registry import METHODS
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.weight import WeightQuantizer
from ricciq.training.loop import Trainer

SHORT = RECIPE.override({"training.epochs": 1, "data.train_samples": 80})


def left_on(model: torch.nn.Module) -> dict[str, dict[str, object]]:
    """Attributes and hooks of every module, without parameters, buffers and children."""
    found = {}
    for name, module in model.named_modules():
        values = {key: value for key, value in vars(module).items() if key[0] != "_"}
        hooks = {
            key: list(value)
            for key, value in vars(module).items()
            if key.endswith("hooks") or key.endswith("hooks_with_kwargs")
        }
        found[name] = {"values": sorted(values), **hooks}
    return found


def quantizers(model: torch.nn.Module) -> list[torch.nn.Module]:
    kinds = WeightQuantizer, ActivationQuantizer
    return [module for module in model.modules() if isinstance(module, kinds)]


def hook(module, inputs, output):
    """A hook of the user."""


@pytest.mark.parametrize("target", ["weights", "activations", "both"])
@pytest.mark.parametrize("name", CATALOG)
def test_detaching_leaves_a_model_as_it_was(name, target):
    model = torch.nn.ModuleList([WeightQuantizer(1, 2), ActivationQuantizer(2)])
    model[1].register_forward_hook(hook)
    before = left_on(model)
    attachment = Attachment(model, Correction(METHODS[name], target))
    for _ in range(2):
        attachment.detach()
        assert left_on(model) == before


@pytest.mark.parametrize("name", CATALOG)
def test_finetuning_leaves_nothing_on_the_model(tmp_path, name):
    changes = {"method.name": name, "method.target": "both", "training.ema": 0.9}
    run = Run(tmp_path, SHORT.override(changes))
    run.model.register_forward_hook(hook)
    before = left_on(run.model)
    run.train()
    assert left_on(run.model) == before
    assert len(quantizers(run.model)) > 10
    for quantizer in quantizers(run.model):
        assert getattr(quantizer, "slope", None) is None
        assert quantizer.perturbation is type(quantizer).perturbation


def test_training_that_fails_leaves_nothing_on_the_model(tmp_path):
    run = Run(tmp_path, SHORT.override({"method.name": "ewgs", "method.target": "both"}))
    before = left_on(run.model)
    run.correction = Correction(METHODS["ewgs"], "both")
    run.folder.last.write_bytes(b"no state")
    with pytest.raises(CheckpointError):
        run.train(resume=True)
    assert left_on(run.model) == before


def test_a_trainer_that_cannot_be_made_leaves_nothing_on_the_model(tmp_path):
    run = Run(tmp_path, SHORT)
    run.recipe = SHORT.override({"training.opt": "magic"})
    before = left_on(run.model)
    with pytest.raises(RecipeError):
        run.trainer()
    assert left_on(run.model) == before


@pytest.mark.parametrize("name", ["ricci", "ewgs", "stochastic"])
def test_a_trainer_attaches_the_estimator_until_its_end(tmp_path, name):
    run = Run(tmp_path, SHORT.override({"method.name": name, "method.target": "both"}))
    before = left_on(run.model)
    with run.trainer() as trainer:
        assert isinstance(trainer, Trainer)
        assert left_on(run.model) != before
    assert left_on(run.model) == before
