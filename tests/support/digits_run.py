"""A small training run on digits, in this process, that tests can reach into."""

import copy
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ricciq.convert.rewrite import convert
from ricciq.quant.calibration import calibrate
from ricciq.recipe import Recipe
from ricciq.runs.folder import RunFolder
from ricciq.system.journal import Journal
from ricciq.training.loop import correction_of, finetune
from ricciq.training.pace import FirstSteps
from ricciq.training.state import TrainingState
from ricciq.training.step import Trainer
from ricciq.workflows.job import prepare
from ricciq.workflows.session import Session

CPU = torch.device("cpu")
RECIPE = Recipe().override(
    {
        "model.name": "digits_resnet8",
        "data.name": "digits",
        "data.batch_size": 40,
        "data.train_samples": 200,
        "data.augmentation": {"pad_crop": 1, "hflip": 0.0},
        "quantization.weight_bits": 2,
        "quantization.act_bits": 2,
        "training.epochs": 2,
        "training.lr": 5e-3,
        "device": "cpu",
    }
)
STEPS = 5  # an epoch


class Run:
    """A converted, calibrated digits net and what is needed to train it in a folder."""

    def __init__(self, path: Path, recipe: Recipe = RECIPE) -> None:
        path.mkdir(exist_ok=True)
        self.folder, self.recipe = RunFolder(path), recipe
        self.job = prepare(recipe, Session(CPU))
        self.model = self.job.model
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.correction = correction_of(recipe)
        convert(self.model, self.job.plan)
        calibrate(self.model, [images for images, _ in islice(self.job.loader("fit"), 2)])

    def train(
        self,
        resume: bool = False,
        journal: Journal | None = None,
        first_steps: FirstSteps | None = None,
    ) -> TrainingState:
        return finetune(
            self.model,
            self.job.loader("fit", training=True),
            self.job.loader("holdout"),
            self.recipe,
            self.correction,
            device=CPU,
            folder=self.folder,
            teacher=self.teacher,
            metadata=self.job.metadata,
            journal=journal,
            resume=resume,
            first_steps=first_steps,
        )

    def trainer(self) -> Trainer:
        return Trainer(self.model, self.recipe, self.correction, CPU, STEPS, self.teacher)

    def batch(self) -> tuple[Tensor, Tensor]:
        return next(iter(self.job.loader("fit")))
