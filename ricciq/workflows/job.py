"""A recipe made ready: its data open, its model loaded, its conversion planned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ricciq._version import __version__
from ricciq.convert.plan import Plan, plan_conversion
from ricciq.data.dataset import PictureData, Split
from ricciq.data.loader import Batch
from ricciq.data.open import open_data
from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import UsageError
from ricciq.estimators.apply import Correction
from ricciq.estimators.registry import named_estimator
from ricciq.models.factory import load_model
from ricciq.recipe import Recipe
from ricciq.system.distributed import World, local_device
from ricciq.system.journal import Journal
from ricciq.training.optim import WithFeatures, check_training
from ricciq.training.step import recompute_activations


class Job(NamedTuple):
    """A recipe with everything it names loaded, and the plan made."""

    recipe: Recipe
    device: torch.device
    data: PictureData
    model: nn.Module
    preprocessing: Preprocessing
    plan: Plan
    messages: list[str]

    def loader(
        self,
        split: Split,
        *,
        training: bool = False,
        samples: int | None = None,
        batch_size: int | None = None,
        world: World | None = None,
    ) -> DataLoader[Batch]:
        """Batches of one split as the recipe wants them, or as the arguments do.

        Args:
            split: see `PictureData.loader`.
            training: shuffle and augment.
            samples: take so many of them.
            batch_size: pictures in a batch.
            world: the processes to share the pictures with.
        """
        settings = self.recipe.data
        if samples is None and split == "fit":
            samples = settings.train_samples
        return self.data.loader(
            split,
            self.preprocessing,
            batch_size=batch_size or settings.known_batch_size,
            workers=min(settings.workers, os.cpu_count() or 1),
            training=training,
            seed=self.recipe.seed,
            augmentation=settings.augmentation if training else None,
            train_samples=samples,
            pin_memory=self.device.type == "cuda",
            world=world,
        )

    def calibration_images(self, parts: int = 1, most: int | None = None) -> Iterator[Tensor]:
        """Training pictures as they are, of every class alike, one batch in memory at a time.

        Args:
            parts: in how many parts the batches of a step are taken; as many times the pictures.
            most: stop at so many pictures. They too are of every class, which the first of more
                would not be: a folder is read class by class.
        """
        settings = self.recipe.data
        wanted = settings.calibration_batches * settings.known_batch_size * parts
        there = len(self.loader("fit").dataset)  # type: ignore[arg-type]
        wanted = min(wanted, there, wanted if most is None else most)
        for images, _ in self.loader("fit", samples=wanted):
            yield images.to(self.device)

    @property
    def about(self) -> dict[str, Any]:
        """What has to be known to rebuild the model without its data."""
        return {
            "ricciq": __version__,
            "recipe": self.recipe.model_dump(mode="json"),
            "preprocessing": self.preprocessing.to_dict(),
            "class_names": self.data.class_names,
            "labelled": self.data.labelled,
            "plan": asdict(self.plan),
        }


def choose_device(name: str) -> torch.device:
    """The device a recipe names.

    Raises:
        UsageError: this machine has none of that name.
    """
    name = local_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name} is not on this machine ({torch.cuda.device_count()} CUDA devices); "
            "take --device cpu"
        )
    return device


def prepare(recipe: Recipe, device: torch.device, journal: Journal, weights: bool = True) -> Job:
    """Open the data, load the model and plan its conversion; nothing is written or changed.

    Args:
        recipe: what to do.
        device: where the model goes.
        journal: where messages are shown.
        weights: load those that timm knows; a plan can do without.
    """
    named_estimator(recipe.method.name, recipe.method.changes)
    check_training(recipe.training)
    data = open_data(recipe.data.name, recipe.data.dir, recipe.data.holdout)
    loaded = load_model(
        recipe.model.name,
        num_classes=data.num_classes if data.labelled else None,
        channels=data.channels,
        checkpoint=recipe.model.checkpoint,
        pretrained=recipe.model.pretrained and weights,
        input_size=recipe.data.input_size,
        seed=recipe.seed,
    )
    if recipe.training.grad_checkpointing:  # found out now, switched on by the trainer
        recompute_activations(loaded.model, True)
        recompute_activations(loaded.model, False)
    recipe.data.augmentation.transform(loaded.preprocessing)  # refuses an unknown policy
    if recipe.training.distill_features:
        WithFeatures(loaded.model)  # refuses a model that has none
    for message in loaded.messages:
        journal.say(message)
    # Convolutions are faster so, on GPUs and CPUs.
    model = loaded.model.to(device).to(memory_format=torch.channels_last)
    bits = recipe.quantization
    example = torch.zeros(2, *loaded.preprocessing.input_size, device=device)
    plan = plan_conversion(model, example, bits.planned_bits, bits.act_bits, bits.edge_bits)
    if not data.labelled:
        recipe = _without_labels(recipe, plan, journal)
        data.set_answers(int(model.num_classes), {})  # type: ignore[arg-type]
    return Job(recipe, device, data, model, loaded.preprocessing, plan, loaded.messages)


def _without_labels(recipe: Recipe, plan: Plan, journal: Journal) -> Recipe:
    """A recipe for pictures without labels: the float model alone teaches.

    Raises:
        UsageError: it asks for what needs labels.
    """
    name, training = recipe.data.name, recipe.training
    augmentation = recipe.data.augmentation
    if not plan.layers:
        raise UsageError(
            f"data {name} has no labels, which training in float needs; give --bits 1 to 8"
        )
    if not training.distill:
        raise UsageError(
            f"data {name} has no labels, so only the float model can teach; give training.distill "
            "more than 0"
        )
    if augmentation.mixup or augmentation.cutmix:
        raise UsageError(
            f"data {name} has no labels for --mixup or --cutmix to mix; leave them out"
        )
    if training.distill < 1:
        journal.say(
            f"data {name} has no labels: the float model alone teaches, and training.distill "
            f"{training.distill:g} counts as 1"
        )
    return recipe.override({"training.distill": 1.0})


@torch.no_grad()
def take_answers(job: Job) -> None:
    """Where pictures have no labels, judge by what the float model answers.

    What is called accuracy of such a run is agreement with that model.
    """
    if job.data.labelled:
        return
    model = job.model.eval()
    splits: tuple[Split, ...] = ("holdout", "val")
    answers = {
        split: torch.cat([model(x.to(job.device)).argmax(1).cpu() for x, _ in job.loader(split)])
        for split in splits
    }
    job.data.set_answers(job.data.num_classes, {s: a.numpy() for s, a in answers.items()})


def correction_of(recipe: Recipe) -> Correction:
    """What a recipe's method does to gradients."""
    estimator = named_estimator(recipe.method.name, recipe.method.changes)
    return Correction(estimator, recipe.method.corrects)


def is_distilled(job: Job) -> bool:
    """Whether the float model teaches: not where nothing becomes discrete."""
    settings = job.recipe.training
    return bool(job.plan.layers and (settings.distill or settings.distill_features))
