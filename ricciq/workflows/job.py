"""A recipe made ready: its data open, its model loaded, its conversion planned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ricciq.convert.plan import Plan, plan_conversion
from ricciq.data.dataset import ImageData, Split
from ricciq.data.loader import Batch
from ricciq.data.open import open_data
from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import UsageError
from ricciq.estimators.apply import Correction
from ricciq.models.factory import load_model
from ricciq.recipe import Recipe
from ricciq.runs.metadata import RunMetadata
from ricciq.system.distributed import World
from ricciq.system.journal import Journal
from ricciq.training.loop import correction_of
from ricciq.training.optim import WithFeatures, check_training
from ricciq.training.step import recompute_activations
from ricciq.workflows.session import Session


class Job(NamedTuple):
    """A recipe with everything it names loaded, and the plan made.

    Attributes:
        recipe: what to do, completed by what the data ask for.
        device: where the model is.
        data: with the float model's predictions as labels where there are none.
        model: in float until `ricciq.workflows.train.train` converts it in place.
        preprocessing: of the model's input.
        plan: what becomes discrete.
        correction: what happens to the gradients between backward and step.
        messages: what was changed to make the weights fit.
    """

    recipe: Recipe
    device: torch.device
    data: ImageData
    model: nn.Module
    preprocessing: Preprocessing
    plan: Plan
    correction: Correction
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
            split: see `ImageData.loader`.
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
    def metadata(self) -> RunMetadata:
        """What is needed to rebuild the model without its data."""
        return RunMetadata(
            preprocessing=self.preprocessing,
            class_names=self.data.class_names,
            labelled=self.data.labelled,
            recipe=self.recipe,
            plan=self.plan,
        )


def prepare(
    recipe: Recipe, session: Session, *, weights: bool = True, pseudo_labels: bool = True
) -> Job:
    """Open the data, load the model and plan its conversion; nothing is written.

    Args:
        recipe: what to do.
        session: where to do it.
        weights: load those that timm knows; a plan can do without.
        pseudo_labels: where data have no labels, use the float model's predictions, which takes a
            pass over the held-out and the validation images.

    Returns:
        The job.

    Raises:
        UsageError: the data have no labels, and the recipe asks for what needs them.
        RicciqError: the recipe, the data or the model cannot be used.
    """
    correction = correction_of(recipe)
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
        session.journal.say(message)
    # Convolutions are faster so, on GPUs and CPUs.
    model = loaded.model.to(session.device).to(memory_format=torch.channels_last)
    bits = recipe.quantization
    example = torch.zeros(2, *loaded.preprocessing.input_size, device=session.device)
    plan = plan_conversion(model, example, bits.planned_bits, bits.act_bits, bits.edge_bits)
    if not data.labelled:
        recipe = _without_labels(recipe, plan, session.journal)
        data.set_pseudo_labels(int(model.num_classes), {})  # type: ignore[arg-type]
    job = Job(
        recipe,
        session.device,
        data,
        model,
        loaded.preprocessing,
        plan,
        correction,
        loaded.messages,
    )
    if pseudo_labels and not data.labelled:
        _use_predictions_as_labels(job)
    return job


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
def _use_predictions_as_labels(job: Job) -> None:
    """Use the float model's predictions as labels of the images to judge by.

    The accuracy of such a run is agreement with that model.
    """
    model = job.model.eval()
    splits: tuple[Split, ...] = ("holdout", "val")
    answers = {
        split: torch.cat([model(x.to(job.device)).argmax(1).cpu() for x, _ in job.loader(split)])
        for split in splits
    }
    job.data.set_pseudo_labels(job.data.num_classes, {s: a.numpy() for s, a in answers.items()})


def is_distilled(job: Job) -> bool:
    """Whether the float model teaches: not where nothing becomes discrete."""
    settings = job.recipe.training
    return bool(job.plan.layers and (settings.distill or settings.distill_features))
