"""The fine-tuning loop: forward through fake quantization, backward, Ricci correction, step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ricciq.checkpoint import (
    restore_training_state,
    save_tensors,
    training_state,
    write_atomically,
)
from ricciq.convert import quantized_layers
from ricciq.correction import (
    ActivationCorrection,
    Correction,
    DiscreteWeight,
    override_forward,
)
from ricciq.errors import DivergedError, RecipeError
from ricciq.evaluate import Metrics, evaluate
from ricciq.flow import Geometry
from ricciq.history import Codes, History, Tally
from ricciq.journal import Journal
from ricciq.loading import Batch, set_epoch
from ricciq.oscillation import Damping, Freezing
from ricciq.recipe import Recipe, TrainingSection
from ricciq.runfolder import RunFolder

MAX_BAD_STEPS = 20
"""Steps in a row without finite gradients after which training gives up."""


@dataclass
class Progressed:
    """How far a run has come; what the state file remembers beside the tensors.

    Attributes:
        epoch: epochs finished.
        steps: optimizer steps taken.
        images: pictures trained on.
        seconds: time spent training, over all sittings.
        skipped: steps skipped because gradients were not finite.
        best_top1: the highest hold-out top-1 of an epoch, percent.
        chosen_epoch: the epoch whose weights were kept, counted from 1; 0 before the first.
        chosen_top1: its hold-out top-1, percent.
        scaler: state of the loss scaler, empty unless training in float16.
    """

    epoch: int = 0
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best_top1: float = 0.0
    chosen_epoch: int = 0
    chosen_top1: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)


def loss_function(
    logits: Tensor, targets: Tensor, teacher_logits: Tensor | None, settings: TrainingSection
) -> Tensor:
    """Cross-entropy, blended with the divergence from the float model's softened guesses.

    Args:
        logits: (B, classes) of the model under training.
        targets: (B,) class numbers, or (B, classes) shares of mixed pictures.
        teacher_logits: (B, classes) of the float model, or None without distillation.
        settings: ``distill`` is the teacher's share, ``temperature`` softens both sides.

    Returns:
        A scalar, in nats (Hinton et al. 2015, arXiv 1503.02531).
    """
    hard = F.cross_entropy(logits, targets, label_smoothing=settings.label_smoothing)
    if teacher_logits is None:
        return hard
    t = settings.temperature
    soft = F.kl_div(
        F.log_softmax(logits / t, 1),
        F.log_softmax(teacher_logits / t, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - settings.distill) * hard + settings.distill * t**2 * soft


def finetune(
    model: nn.Module,
    fit: DataLoader[Batch],
    holdout: Iterable[Batch],
    recipe: Recipe,
    correction: Correction,
    *,
    device: torch.device,
    folder: RunFolder,
    teacher: nn.Module | None = None,
    about: Mapping[str, Any],
    journal: Journal,
    resume: bool = False,
) -> Progressed:
    """Train a converted, calibrated model in place, saving its state every epoch.

    Args:
        model: on ``device``.
        fit: training batches.
        holdout: batches held out of the training data, to choose the best epoch with.
        recipe: schedule, batch size, mixed precision, compilation and seed.
        correction: what happens to the gradients between backward and step.
        device: where to compute.
        folder: receives the states, summary.csv and geometry.csv.
        teacher: the float model to distil from, on ``device``.
        about: stored beside the best epoch's weights.
        journal: where progress is shown.
        resume: go on from the folder's last state.

    Returns:
        How far it came; ``folder.best`` holds the best epoch's weights.

    Raises:
        DivergedError: gradients were not finite for `MAX_BAD_STEPS` steps in a row.
        RecipeError: timm knows no such optimizer or schedule.
    """
    trainer = Trainer(model, recipe, correction, device, len(fit), teacher)
    done, history = Progressed(), History()
    if resume and folder.last.is_file():
        done = Progressed(
            **restore_training_state(trainer.changing, trainer.optimizer, folder.last)
        )
        if done.scaler:
            trainer.scaler.load_state_dict(done.scaler)
        history = History.read(folder, done.epoch)
    codes = Codes(trainer.weights)
    for epoch in range(done.epoch, recipe.training.epochs):
        started = time.perf_counter()
        set_epoch(fit, epoch)
        with journal.bar(f"epoch {epoch + 1}/{recipe.training.epochs}", len(fit)) as advance:
            tally = trainer.epoch(fit, done, advance)
        done.seconds += time.perf_counter() - started
        rate = tally.images / (time.perf_counter() - started)
        held = evaluate({"holdout": trainer.predict}, holdout)["holdout"]
        done.epoch = epoch + 1
        history.add(
            done.epoch,
            tally,
            held,
            rate,
            trainer.optimizer.param_groups[0]["lr"],
            trainer.geometry,
            codes.changed_share(),
        )
        journal.say(history.describe(recipe.training.epochs))
        _save(folder, trainer, done, held, history, about)
    return done


def discrete_weights(model: nn.Module) -> list[DiscreteWeight]:
    """The weights of a converted model's discrete layers, with their quantizers."""
    return [
        DiscreteWeight(name, layer.latent, layer.weight_quantizer)
        for name, layer in quantized_layers(model).items()
    ]


class Trainer:
    """One optimizer step after another; nothing here touches a file."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        correction: Correction,
        device: torch.device,
        steps_per_epoch: int,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.teacher, self.device = model, teacher, device
        self.settings, self.correction = recipe.training, correction
        self.steps = steps_per_epoch * recipe.training.epochs
        self.damping = Damping(recipe.training.damping, recipe.training.damping_form)
        self.weights = discrete_weights(model)
        override_forward(model, correction)
        self.activations: ActivationCorrection | None = None
        if correction.on != "weights":
            self.activations = ActivationCorrection(model, correction.estimator)
        self.freezing = Freezing(self.weights, recipe.training.freezing)
        # Everything with tensors that a step changes, but for the optimizer.
        self.changing = nn.ModuleDict({"model": model, "freezing": self.freezing})
        self.optimizer, self.schedule = _optimizer_and_schedule(
            model, recipe.training, steps_per_epoch
        )
        on_cuda = device.type == "cuda"
        self.amp = on_cuda if recipe.amp is None else recipe.amp
        half = on_cuda and not torch.cuda.is_bf16_supported()
        self.dtype = torch.float16 if half else torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp and half)
        compiled = on_cuda if recipe.compile is None else recipe.compile
        self.forward = torch.compile(model) if compiled else model
        self.geometry: dict[str, Geometry] = {}
        self.bad_in_a_row = 0

    def epoch(
        self, fit: DataLoader[Batch], done: Progressed, advance: Callable[[Callable[[], str]], None]
    ) -> Tally:
        """Train on every batch once; the geometry is measured at the last one."""
        self.model.train()
        tally, self.geometry = Tally(), {}
        for number, (images, targets) in enumerate(fit, start=1):
            progress = done.steps / self.steps
            self.step(images, targets, tally, progress, measure=number == len(fit))
            done.steps += 1
            done.images += len(targets)
            self.schedule.step_update(done.steps)
            if self.bad_in_a_row >= MAX_BAD_STEPS:
                raise DivergedError(
                    f"training gave no finite gradients for {MAX_BAD_STEPS} steps in a row; "
                    f"lower --lr {self.settings.lr}"
                )
            advance(tally.describe)
        done.skipped += tally.bad
        return tally

    def step(
        self, images: Tensor, targets: Tensor, tally: Tally, progress: float, measure: bool
    ) -> None:
        """Forward, backward, correct, damp, step, freeze; progress: share of training done."""
        if self.activations is not None:
            self.activations.advance(progress)
        # A BatchNorm takes its batch into its averages in the forward pass, a NaN too, for good.
        averages = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        images = images.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        watching: AbstractContextManager[dict[nn.Module, float]] = nullcontext({})
        if measure and self.activations is not None and self.correction.on == "activations":
            watching = self.activations.measuring()
        with watching as cosines:
            with torch.autocast(self.device.type, self.dtype, enabled=self.amp):
                logits = self.forward(images).float()
                with torch.no_grad():
                    taught = None if self.teacher is None else self.teacher(images).float()
            loss = loss_function(logits, targets, taught, self.settings)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

        self.scaler.unscale_(self.optimizer)
        # One number says whether all gradients are finite; a step with a NaN would ruin the run.
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = bool(nn.utils.get_total_norm(gradients).isfinite())
        if finite:
            if measure:
                self.geometry = self._measured(progress, cosines)
            self.correction(self.weights, progress)
            self.damping(self.weights, progress)
            if self.settings.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
            with self.correction.within_trust(self.weights):
                self.scaler.step(self.optimizer)
            self.freezing(progress)
        else:
            for buffer, before in averages:
                buffer.copy_(before)
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        self.scaler.update()
        self.optimizer.zero_grad()
        tally.add(loss, logits, targets, finite)

    def _measured(self, progress: float, cosines: Mapping[nn.Module, float]) -> dict[str, Geometry]:
        """The geometry of each layer; where only its inputs' gradients turn, how far they do."""
        geometry = self.correction.measure(self.weights, progress)
        for name, layer in quantized_layers(self.model).items():
            quantizer = layer.input_quantizer
            if name in geometry and quantizer is not None and quantizer in cosines:
                geometry[name] = geometry[name]._replace(mismatch_cosine=cosines[quantizer])
        return geometry

    def predict(self, images: Tensor) -> Tensor:
        """Logits in evaluation mode."""
        logits: Tensor = self.model.eval()(images.to(self.device))
        return logits


def check_training(settings: TrainingSection) -> None:
    """Find out whether timm can do what the settings ask for, before anything is done.

    Raises:
        RecipeError: it knows no such optimizer or schedule.
    """
    _optimizer_and_schedule(nn.Linear(1, 1), settings, steps_per_epoch=1)


def _optimizer_and_schedule(
    model: nn.Module, settings: TrainingSection, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any]:
    """From timm's factories; what has one dimension (steps, biases, BatchNorm) does not decay."""
    try:
        optimizer = create_optimizer_v2(
            model, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay
        )
    # timm asserts that CUDA, APEX or bitsandbytes is there for those optimizers that need it.
    except (ValueError, AssertionError, ImportError) as error:
        raise RecipeError(
            f"training.opt = {settings.opt} cannot be used ({error}); take sgd or adamw"
        ) from None
    if getattr(optimizer, "is_second_order", False):
        raise RecipeError(
            f"training.opt = {settings.opt} needs second derivatives; take sgd or adamw"
        )
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=settings.sched,
            num_epochs=max(settings.epochs, 1),
            warmup_epochs=settings.warmup_epochs,
            min_lr=settings.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise RecipeError(
            f"training.sched = {settings.sched} cannot be used ({error}); take cosine"
        ) from None
    if schedule is None:
        raise RecipeError(f"training.sched = {settings.sched} is no schedule of timm; take cosine")
    return optimizer, schedule


def _save(
    folder: RunFolder,
    trainer: Trainer,
    done: Progressed,
    held: Metrics,
    history: History,
    about: Mapping[str, Any],
) -> None:
    """Write the epoch's results; the state last, since it is what says that the epoch is done."""
    done.best_top1 = max(done.best_top1, held.top1)
    if held.top1 >= done.best_top1 - _standard_error(done.best_top1, held.samples):
        done.chosen_epoch, done.chosen_top1 = done.epoch, held.top1
        chosen = {**about, "epoch": done.epoch, "holdout_top1": held.top1}
        save_tensors(folder.best, trainer.model.state_dict(), chosen)
    done.scaler = trainer.scaler.state_dict()
    history.write(folder)
    tensors, metadata = training_state(trainer.changing, trainer.optimizer, vars(done))
    save_tensors(folder.last, tensors, metadata)
    write_atomically(folder.state, json.dumps(vars(done), indent=1) + "\n")


def _standard_error(percent: float, samples: int) -> float:
    """Of a share measured on so many samples, in percent points.

    A hold-out of a few hundred pictures cannot tell epochs apart that differ by less; among those
    the latest is taken (the one-standard-error rule of Breiman et al. 1984), since a schedule that
    ends near zero is meant to end well.
    """
    # Laplace's rule of succession: a share of 100 % on a few pictures is not certain either.
    share = (percent / 100 * samples + 1) / (samples + 2)
    return 100 * math.sqrt(share * (1 - share) / samples)
