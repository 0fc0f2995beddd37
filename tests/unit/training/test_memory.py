"""The memory of a step: how it is counted, and what happens if there is too little."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from digits_run import Run
from torch import nn

from ricciq.convert.plan import plan_conversion
from ricciq.convert.rewrite import convert
from ricciq.errors import RicciqError, is_out_of_memory
from ricciq.recipe import Recipe
from ricciq.training import loop as train
from ricciq.training import memory
from ricciq.training.memory import (
    StepMemory,
    halve_until,
    largest_batch,
    step_memory,
)
from ricciq.workflows.job import prepare
from ricciq.workflows.session import Session
from ricciq.workflows.sizing import describe, find_batch_size

CPU = torch.device("cpu")
RECIPE = Recipe().override({"model.name": "digits_resnet8", "data.name": "digits", "device": "cpu"})


def test_tensors_that_a_forward_pass_keeps_are_counted():
    model = nn.Sequential(nn.Linear(10, 20), nn.Sigmoid(), nn.Linear(20, 5))
    found = step_memory(model, torch.zeros(4, 10), None, moments=2)
    parameters = 10 * 20 + 20 + 20 * 5 + 5
    # Kept for each image: the input of the first layer, and the output of the sigmoid.
    assert found == StepMemory(4 * parameters * 4, 4 * (10 + 20))
    assert found.bytes(8) == 16 * parameters + 8 * 120


def test_a_teacher_and_fewer_moments_are_counted():
    model, teacher = nn.Linear(10, 10), nn.Linear(10, 30)
    found = step_memory(model, torch.zeros(2, 10), teacher, moments=1)
    assert found.fixed == 3 * 4 * 110 + 4 * 330


def test_what_is_kept_for_discrete_weights_does_not_grow_with_the_images(tiny_quantized, pictures):
    model, plan = tiny_quantized(2, 2)
    small, large = (step_memory(model, pictures[:n].clone(), None, moments=1) for n in (2, 16))
    weights = [model.get_submodule(layer.name).latent for layer in plan.layers]
    parameters = sum(p.numel() for p in model.parameters())
    discrete = sum(weight.numel() for weight in weights)
    for found in (small, large):
        # Beside the parameters, their gradients and moments: every weight as it was rounded.
        assert found.fixed >= 4 * (3 * parameters + discrete)
        assert found.fixed == pytest.approx(4 * (3 * parameters + discrete), rel=0.05)
    whole = [found.bytes(n) for found, n in ((small, 2), (large, 16))]
    assert small.per_image == pytest.approx((whole[1] - whole[0]) / 14, rel=0.02)


MEASURE = """
import timm, torch
from ricciq.convert.plan import plan_conversion
from ricciq.convert.rewrite import convert
from ricciq.training.memory import step_memory

torch.set_num_threads(1)
model = timm.create_model("test_resnet", num_classes=10)
convert(model, plan_conversion(model.eval(), torch.zeros(2, 3, 96, 96), 2, 2))
counted = step_memory(model, torch.zeros(4, 3, 96, 96), None, moments=1).per_image

def peak(images):
    model.train()(torch.zeros(images, 3, 96, 96)).sum().backward()
    with open("/proc/self/status") as file:  # getrusage would count the parent's too
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))

small = peak(8)
print((peak(40) - small) / 32 / counted)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_grows_by_about_the_counted_memory():
    shown = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    assert 0.7 < float(shown.stdout) < 1 / memory.RESERVE


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), True),
        (type("OurError", (torch.OutOfMemoryError,), {})("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_errors_that_mean_that_memory_ran_out(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_sizes_are_halved_until_one_fits():
    assert halve_until(lambda size: size <= 30, 128) == 16
    assert halve_until(lambda _: False, 128) == 0


def test_the_largest_batch_leaves_a_reserve():
    assert largest_batch(StepMemory(0, 10), 10_000) == memory.LARGEST_BATCH
    assert largest_batch(StepMemory(0, 100), 10_000) == 32
    assert largest_batch(StepMemory(9_000, 100), 10_000) == 1


def test_auto_finds_the_largest_batch_size_that_fits(monkeypatch):
    job = prepare(RECIPE.override({"data.batch_size": "auto"}), Session(CPU))
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    assert find_batch_size(job) == 256
    monkeypatch.setattr("ricciq.workflows.sizing.free_memory", lambda _: 10_000_000)
    small = find_batch_size(job)
    assert small < 256
    assert describe(job)["batch_size"] == small
    after = job.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
def test_out_of_memory_names_the_batch_size_that_fitted(tmp_path, monkeypatch):
    forward = train.Trainer._loss

    def narrow(trainer, images, *others):
        if len(images) > 24:
            torch.empty(2**60)  # more than there is, for torch's own error
        return forward(trainer, images, *others)

    monkeypatch.setattr(train.Trainer, "_loss", narrow)
    with pytest.raises(RicciqError) as caught:
        Run(tmp_path, RECIPE.override({"data.batch_size": 100})).train()
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        "the memory of cpu is not enough for a step with batch size 100, but 12 fitted; give "
        "--batch-size 12, and --grad-accum-steps 9 for steps as large"
    )
    found = find_batch_size(prepare(RECIPE.override({"data.batch_size": "auto"}), Session(CPU)))
    assert found == 16


@pytest.mark.slow
def test_gradient_checkpointing_keeps_less_memory():
    model = timm.create_model("test_efficientnet", num_classes=10)
    images = torch.zeros(4, 3, 64, 64)
    convert(model, plan_conversion(model.eval(), images, 2, 2))
    whole = step_memory(model, images, None, moments=1)
    model.set_grad_checkpointing(True)
    assert step_memory(model, images, None, moments=1).per_image < whole.per_image / 2
