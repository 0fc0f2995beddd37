"""The batch size that fits is found, and a step that does not fit says which would have."""

from __future__ import annotations

import re

import pytest
import torch
from networks import DEVICE

from ricciq.errors import RicciqError
from ricciq.recipe import Recipe
from ricciq.runs.folder import RunFolder
from ricciq.training.memory import LARGEST_BATCH
from ricciq.workflows.job import prepare
from ricciq.workflows.quantize import run
from ricciq.workflows.session import Session
from ricciq.workflows.sizing import find_batch_size
from ricciq.workflows.train import train

GIGABYTES = 3
"""Of the GPU's memory that torch is left with."""


def test_auto_takes_what_fits():
    recipe = Recipe().override(
        {"model.name": "digits_resnet8", "data.name": "digits", "data.batch_size": "auto"}
    )
    size = find_batch_size(prepare(recipe, Session(DEVICE)))
    assert size == LARGEST_BATCH


@pytest.fixture
def little_memory():
    if DEVICE.type != "cuda":
        pytest.skip("needs a GPU, whose memory can be limited")
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(GIGABYTES * 1e9 / whole)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


LARGE = {
    "model.name": "resnet18",
    "model.pretrained": False,
    "data.name": "digits",
    "data.input_size": 224,
    "data.train_samples": 300,
    "data.calibration_batches": 1,
    "training.epochs": 1,
    "device": "cuda",
    "compile": False,
}


@pytest.mark.usefixtures("little_memory")
def test_auto_is_halved_until_it_fits():
    job = prepare(Recipe().override({**LARGE, "data.batch_size": "auto"}), Session(DEVICE))
    size = find_batch_size(job)
    assert 1 <= size < LARGEST_BATCH
    assert size & (size - 1) == 0


@pytest.mark.usefixtures("little_memory")
def test_too_little_memory_names_what_fitted(tmp_path):
    recipe = Recipe().override({**LARGE, "data.batch_size": 256, "data.calibration_batches": 1})
    with pytest.raises(RicciqError, match="is not enough for a step with batch size 256") as error:
        run(recipe, tmp_path / "run")
    (size,) = re.findall(r"but (\d+) fitted; give --batch-size \1", str(error.value))
    fitting = recipe.override({"data.batch_size": int(size), "data.train_samples": 2 * int(size)})
    session = Session(DEVICE, folder=RunFolder(tmp_path))
    assert train(prepare(fitting, session), session).progress.steps >= 1
