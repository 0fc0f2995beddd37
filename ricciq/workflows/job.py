"""A job: a recipe with its data opened, its model loaded and its conversion planned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from ricciq.convert.plan import Plan, plan_conversion
from ricciq.data.dataset import ImageData, Split
from ricciq.data.loader import Batch
from ricciq.data.open import open_data
from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import DataError, UsageError
from ricciq.estimators.apply import Correction
from ricciq.models.kind import number_of_classes
from ricciq.quant.grid import FLOAT_BITS
from ricciq.recipe import Recipe
from ricciq.recipe.schedule import epochs_for
from ricciq.runs.metadata import RunMetadata
from ricciq.system.distributed import World
from ricciq.system.journal import Journal
from ricciq.training.loop import correction_of
from ricciq.training.memory import recompute_activations
from ricciq.training.optim import WithFeatures, check_training
from ricciq.workflows.load_float import load_float
from ricciq.workflows.session import Session


class Job(NamedTuple):
    """A recipe, everything that it names, and the plan of the conversion.

    Attributes:
        recipe: what to do; adapted if the data have no labels.
        device: device of the model.
        data: without labels, with the float model's predictions in their place.
        model: float until `ricciq.workflows.train.train` converts it in place.
        preprocessing: of the model's input.
        plan: the layers to quantize.
        correction: what changes the gradients between backward pass and optimizer step.
        messages: what was changed to load the weights, and which files are not used.
        has_new_head: whether the head of the model is random.
    """

    recipe: Recipe
    device: torch.device
    data: ImageData
    model: nn.Module
    preprocessing: Preprocessing
    plan: Plan
    correction: Correction
    messages: list[str]
    has_new_head: bool

    @property
    def knows_classes(self) -> bool:
        """Whether the weights that were loaded should know the classes of the data."""
        known = self.recipe.model.has_weights
        return known and self.data.labelled and not self.has_new_head

    @property
    def float_epochs(self) -> int:
        """Epochs to train the float model for before it is quantized."""
        settings = self.recipe.training
        if not self.plan.layers:  # then training is that of the float model
            return 0
        if settings.float_epochs is not None:
            return settings.float_epochs
        if not self.has_new_head:
            return 0
        return settings.epochs or epochs_for(self.count("fit"), FLOAT_BITS)

    @property
    def head_epochs(self) -> int:
        """Epochs to train the head of the float model for, alone, before all of it."""
        return math.ceil(self.float_epochs / 4) if self.has_new_head else 0

    def loader(
        self,
        split: Split,
        *,
        training: bool = False,
        samples: int | None = None,
        batch_size: int | None = None,
        device: torch.device | None = None,
        world: World | None = None,
    ) -> DataLoader[Batch]:
        """Batches of one split, as the recipe says unless the arguments say otherwise.

        Args:
            split: see `ImageData.loader`.
            training: shuffle and augment.
            samples: number of images; by default all, or the recipe's.
            batch_size: images in a batch.
            device: where the batches are made; by default the job's.
            world: the processes to share the images with.
        """
        settings = self.recipe.data
        if samples is None and split == "fit":
            samples = settings.train_samples
        return self.data.loader(
            split,
            self.preprocessing,
            batch_size=batch_size or settings.known_batch_size,
            workers=settings.workers,
            training=training,
            seed=self.recipe.seed,
            augmentation=settings.augmentation if training else None,
            train_samples=samples,
            device=device or self.device,
            persistent_workers=training,
            world=world,
        )

    def count(self, split: Split) -> int:
        """The number of images that the recipe takes of a split.

        Args:
            split: see `ImageData.loader`.
        """
        wanted = self.recipe.data.train_samples if split == "fit" else None
        return self.data.count(split) if wanted is None else min(wanted, self.data.count(split))

    def calibration_batches(self, parts: int = 1, most: int | None = None) -> DataLoader[Batch]:
        """Batches of unaugmented training images, the classes in proportion.

        Args:
            parts: number of batches in an optimizer step; so many times more images are taken.
            most: largest number of images.
        """
        settings = self.recipe.data
        wanted = settings.calibration_batches * settings.known_batch_size * parts
        wanted = min(wanted, self.count("fit"), wanted if most is None else most)
        return self.loader("fit", samples=wanted)

    def calibration_images(self, parts: int = 1, most: int | None = None) -> Iterator[Tensor]:
        """The images of `calibration_batches`.

        Args:
            parts: as there.
            most: as there.
        """
        for images, _ in self.calibration_batches(parts, most):
            yield images

    @property
    def metadata(self) -> RunMetadata:
        """The metadata from which the model can be rebuilt without its data."""
        return RunMetadata(
            preprocessing=self.preprocessing,
            class_names=self.data.class_names,
            labelled=self.data.labelled,
            recipe=self.recipe,
            plan=self.plan,
        )


def prepare(
    recipe: Recipe,
    session: Session,
    *,
    weights: bool = True,
    pseudo_labels: bool = True,
    data: ImageData | None = None,
) -> Job:
    """Open the data, load the model and plan its conversion. Nothing is written.

    Args:
        recipe: what to do.
        session: gives the device and shows messages.
        weights: load timm's pretrained weights; a plan does not need them.
        pseudo_labels: if the data have no labels, predict them with the float model. This takes a
            pass over the hold-out and the validation images.
        data: the recipe's data, if they are open already.

    Raises:
        UsageError: the data have no labels, and the recipe needs them; a new head is not trained.
        DataError: the data have a single class.
        RicciqError: the recipe, the data or the model cannot be used.
    """
    correction = correction_of(recipe)
    check_training(recipe.training)
    if data is None:
        data = open_data(recipe.data.name, recipe.data.dir, recipe.data.holdout)
    if data.labelled and data.num_classes < 2:
        raise DataError(
            f"data {data.name} has a single class, {data.class_names[0]!r}, so there is nothing to "
            "tell apart; give images of two classes or more"
        )
    loaded = load_float(recipe, data, weights=weights)
    messages = [*data.messages, *loaded.messages]
    # To rebuild it without its weights.
    recipe = recipe.override({"model.kwargs": loaded.kwargs, "model.fuse": loaded.is_fused})
    if recipe.training.grad_checkpointing:  # refuses a model without support
        recompute_activations(loaded.model, True)
        recompute_activations(loaded.model, False)
    recipe.data.augmentation.transform(loaded.preprocessing)  # refuses an unknown policy
    if recipe.training.distill_features:
        WithFeatures(loaded.model)  # refuses a model that has none
    for message in messages:
        session.journal.say(message)
    # Convolutions are faster in this format, on GPUs and CPUs.
    model = loaded.model.to(session.device).to(memory_format=torch.channels_last)
    bits = recipe.quantization
    example = torch.zeros(2, *loaded.preprocessing.input_size, device=session.device)
    plan = plan_conversion(model, example, bits.planned_bits, bits.act_bits, bits.edge_bits)
    if not data.labelled:
        recipe = _without_labels(recipe, plan, session.journal)
        data.set_pseudo_labels(number_of_classes(recipe.model.name, model), {})
    job = Job(
        recipe,
        session.device,
        data,
        model,
        loaded.preprocessing,
        plan,
        correction,
        messages,
        loaded.has_new_head or (not weights and _would_have_new_head(recipe, loaded.model, data)),
    )
    job = _with_trained_teacher(job, session.journal)
    _check_single_values(job, session.world)
    if pseudo_labels and not data.labelled:
        _use_predictions_as_labels(job, session.journal)
    return job


def _without_labels(recipe: Recipe, plan: Plan, journal: Journal) -> Recipe:
    """Adapt a recipe to images without labels: distillation is the only loss.

    Raises:
        UsageError: the recipe needs labels.
    """
    name, training = recipe.data.name, recipe.training
    augmentation = recipe.data.augmentation
    if not plan.layers:
        raise UsageError(
            f"data {name} has no labels, but training in float needs them; give --bits 1 to 8"
        )
    if not training.distill:
        raise UsageError(
            f"data {name} has no labels, so training needs distillation; give training.distill a "
            "value above 0"
        )
    if augmentation.mixup or augmentation.cutmix:
        raise UsageError(
            f"data {name} has no labels, but --mixup and --cutmix need them; leave these out"
        )
    if recipe.data.class_map:
        raise UsageError(
            f"data {name} has no labels, so class map {recipe.data.class_map} has nothing to "
            "number; leave out --class-map"
        )
    if training.distill < 1:
        journal.say(
            f"data {name} has no labels: the model learns from the float model alone, and "
            f"training.distill {training.distill:g} counts as 1"
        )
    return recipe.override({"training.distill": 1.0})


def _would_have_new_head(recipe: Recipe, model: nn.Module, data: ImageData) -> bool:
    """Whether timm's pretrained weights, if they were loaded, would have other classes."""
    config: Any = model.pretrained_cfg
    pretrained = recipe.model.pretrained and recipe.model.checkpoint is None
    return pretrained and data.labelled and config["num_classes"] != data.num_classes


def _with_trained_teacher(job: Job, journal: Journal) -> Job:
    """Check that a new head is trained; if only the discrete model is, it has no teacher.

    Raises:
        UsageError: a new head is not trained at all.
    """
    settings = job.recipe.training
    if not (job.has_new_head and job.plan.layers) or job.float_epochs:
        return job
    if not settings.epochs:
        raise UsageError(
            f"the head of {job.recipe.model.name} is new, so without training its classes would be "
            "guesses; leave out --float-epochs 0 to train the float model, or raise --epochs"
        )
    journal.say("the float model does not teach: its head is new, and float_epochs is 0")
    untaught = {"training.distill": 0.0, "training.distill_features": 0.0}
    return job._replace(recipe=job.recipe.override(untaught))


@torch.no_grad()
def _check_single_values(job: Job, world: World) -> None:
    """Refuse batches of one image where a BatchNorm would get a single value per channel.

    Raises:
        UsageError: there is such a BatchNorm.
    """
    recipe, images = job.recipe, job.count("fit") // world.size
    trained = recipe.training.epochs or job.float_epochs
    if min(recipe.data.known_batch_size, images) > 1 or not trained or recipe.training.freeze_bn:
        return
    alone: list[str] = []

    def note(name: str, given: Tensor) -> None:
        if given.numel() == given.shape[1]:
            alone.append(name)

    with ExitStack() as hooks:
        for name, module in job.model.named_modules():
            if isinstance(module, _BatchNorm):
                hook = module.register_forward_pre_hook(lambda _, x, name=name: note(name, x[0]))
                hooks.callback(hook.remove)
        job.model.eval()(torch.zeros(1, *job.preprocessing.input_size, device=job.device))
    if alone:
        remedy = (
            "a larger --batch-size" if images > 1 else "more training images, as some are held out"
        )
        raise UsageError(
            f"a batch of one image gives {alone[0]} of {recipe.model.name}, a BatchNorm, a single "
            f"value per channel, which has no variance; give {remedy}, or set training.freeze_bn"
        )


@torch.no_grad()
def _use_predictions_as_labels(job: Job, journal: Journal) -> None:
    """Use the float model's predictions as labels of the hold-out and validation images.

    The accuracy of the run is then agreement with the float model.
    """
    model = job.model.eval()
    splits: tuple[Split, ...] = ("holdout", "val")
    predictions = {}
    for split in splits:
        with journal.over("labels", job.loader(split)) as batches:
            predictions[split] = torch.cat([model(x).argmax(1).cpu() for x, _ in batches])
    job.data.set_pseudo_labels(job.data.num_classes, {s: p.numpy() for s, p in predictions.items()})


def is_distilled(job: Job) -> bool:
    """Whether the float model is the teacher; never if no layer is quantized."""
    settings = job.recipe.training
    return bool(job.plan.layers and (settings.distill or settings.distill_features))
