"""The small networks that checks work on, and one trainer for each."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ricciq.convert.rewrite import convert
from ricciq.data.loader import Batch
from ricciq.estimators.metric_flow import Geometry
from ricciq.quant.calibration import calibrate
from ricciq.recipe import Recipe
from ricciq.training.loop import correction_of
from ricciq.training.metrics import Tally
from ricciq.training.step import Trainer
from ricciq.workflows.job import prepare
from ricciq.workflows.session import Session

CPU = torch.device("cpu")
DEVICE = torch.device(os.environ.get("RICCIQ_GPU_DEVICE", "cpu"))
"""What is checked."""
TINY = DEVICE.type == "cpu"
"""Whether it is the script that is checked, on a machine without a GPU."""


USUAL = {
    "model.name": "digits_resnet8",
    "data.name": "digits",
    "quantization.weight_bits": 2,
    "quantization.act_bits": 2,
    "quantization.scale_search": 20,
    "data.calibration_batches": 2,
    "amp": False,
    "compile": False,
    "device": "cpu",
}


def without_tf32() -> None:
    """Compute in float32 on a GPU, too, for the rest of the process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def _move_off_ties(model: nn.Module) -> None:
    """Make every scale 1 % larger.

    Calibration leaves weights on the ends of their range, and pixels on whole codes: there the last
    bit of a device's exp decides what the gradient of a scale is.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_scale"):
                parameter.add_(0.01)


class Training:
    """digits_resnet8, converted and calibrated on a CPU and then put on a device, with a teacher.

    So it is the same on every device, to the bit.

    Args:
        device: where it trains.
        flags: dotted keys of the recipe.
    """

    def __init__(self, device: torch.device, flags: Mapping[str, Any] | None = None) -> None:
        self.recipe = Recipe().override({**USUAL, **(flags or {})})
        self.job = prepare(self.recipe, Session(CPU))
        self.fit = self.job.loader("fit", training=True)
        teacher = copy.deepcopy(self.job.model).eval().requires_grad_(False)
        convert(self.job.model, self.job.plan, self.recipe.quantization.config)
        calibrate(self.job.model, self.job.calibration_images())
        _move_off_ties(self.job.model)
        self.model: nn.Module = self.job.model.to(device)
        self.trainer = Trainer(
            self.model,
            self.recipe,
            correction_of(self.recipe),
            device,
            len(self.fit),
            teacher.to(device),
        )
        self.trainer.begin_epoch()
        self.tally, self.steps = Tally(), 0

    def batch(self) -> Batch:
        """Training images and targets, always the same."""
        images, targets = next(iter(self.job.loader("fit")))
        return images, targets

    def step(self, batch: Batch | None = None, measure: bool = False) -> bool:
        """A step; whether its gradients were finite."""
        batches = [batch or self.batch()]
        finite = self.trainer.step(batches, self.tally, self.steps, measure=measure)
        self.steps += 1
        return finite

    def parameters(self) -> dict[str, torch.Tensor]:
        """Copies of all of them, on the CPU, by name."""
        named = self.model.named_parameters()
        return {name: p.detach().cpu().clone() for name, p in named}


@dataclass(frozen=True)
class Step:
    """What a step did.

    Attributes:
        loss: of its batch.
        before: the parameters that it began with, by name.
        changes: what it added to them.
        geometry: if it was measured.
    """

    loss: float
    before: dict[str, torch.Tensor]
    changes: dict[str, torch.Tensor]
    geometry: dict[str, Geometry]

    def rounding(self, name: str) -> torch.Tensor:
        """How far two float32 parameters may lie apart whose changes are the same."""
        return 4 * torch.finfo(torch.float32).eps * self.before[name].norm()


def a_step(device: torch.device, flags: Mapping[str, Any], measure: bool = False) -> Step:
    """The first step of a training by SGD with momentum."""
    training = Training(device, {"training.opt": "momentum", "training.lr": 0.05, **flags})
    before = training.parameters()
    assert training.step(measure=measure)
    changes = {name: after - before[name] for name, after in training.parameters().items()}
    return Step(float(training.tally.loss), before, changes, training.trainer.geometry)
