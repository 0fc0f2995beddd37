"""The fine-tuning loop: epochs, saved states, resuming, and when training ends."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from itertools import islice
from typing import TypeVar

import torch
from torch import nn
from torch.profiler import record_function
from torch.utils.data import DataLoader

from ricciq.data.loader import Batch, against_waiting, close, set_epoch
from ricciq.errors import DivergedError, UsageError
from ricciq.estimators.apply import Correction
from ricciq.estimators.registry import named_correction
from ricciq.evaluation import Metrics, evaluate, pooled
from ricciq.networks import network_of
from ricciq.recipe import Recipe
from ricciq.runs.folder import RunFolder
from ricciq.runs.metadata import RunMetadata
from ricciq.system.distributed import World
from ricciq.system.files import scratch_folder, write_atomically
from ricciq.system.interrupts import Stopped, Stopping, stopping_between_steps
from ricciq.system.journal import Journal
from ricciq.system.tensor_files import (
    State,
    load_model_state,
    load_tensors,
    restore_training_state,
    save_tensors,
    training_state,
)
from ricciq.training.metrics import History, Tally
from ricciq.training.pace import FirstSteps
from ricciq.training.state import TrainingState, last_state
from ricciq.training.step import CalibrationImages, Trainer

LARGEST_WAIT = 0.2
"""Share of an epoch's time spent waiting for images above which a remedy is named."""
MAX_BAD_STEPS = 20
"""Training ends after so many steps in a row without finite gradients."""
T = TypeVar("T")


def correction_of(recipe: Recipe) -> Correction:
    """The gradient correction that a recipe's ``method`` section describes.

    Raises:
        RecipeError: a setting is invalid, or the method does not have it.
    """
    method = recipe.method
    return named_correction(method.name, method.changes, method.corrects)


def finetune(
    model: nn.Module,
    fit: DataLoader[Batch],
    holdout: Iterable[Batch],
    recipe: Recipe,
    correction: Correction | None = None,
    *,
    device: torch.device | None = None,
    folder: RunFolder | None = None,
    teacher: nn.Module | None = None,
    metadata: RunMetadata | None = None,
    journal: Journal | None = None,
    calibration_images: CalibrationImages | None = None,
    resume: bool = False,
    world: World | None = None,
    first_steps: FirstSteps | None = None,
) -> TrainingState:
    """Train a model in place, either converted and calibrated, or in float.

    The estimator is detached from the model when training ends, for whatever reason.

    Args:
        model: any classifier, not only timm's, on ``device``.
        fit: training batches; with several processes, the share of this one.
        holdout: batches held out of the training data, by which the best epoch is chosen; with
            several processes, the share of this one.
        recipe: schedule, batch size, mixed precision, compilation and seed.
        correction: what happens to gradients after the backward pass; by default what the recipe's
            method describes.
        device: where to compute; by default the model's device.
        folder: receives states, summary.csv and geometry.csv from the first process. Without one
            nothing stays on disk, and the model ends with the best epoch's weights.
        teacher: the float model to distil from, on ``device``.
        metadata: stored with the best epoch's weights.
        journal: shows progress; by default nothing is shown.
        calibration_images: makes batches of training images, for recipes with ``progressive`` or
            ``reestimate_bn``.
        resume: resume from the folder's last state.
        world: the processes that train together.
        first_steps: times the first steps; every process calls it.

    Returns:
        The progress. ``folder.best`` has the best epoch's weights, the model those of the last.

    Raises:
        CheckpointError: the state to resume from is damaged or of another version.
        DivergedError: gradients were not finite for `MAX_BAD_STEPS` steps in a row.
        ModelError: its weights are not float32, or its output has no logits.
        RecipeError: timm has no such optimizer or schedule, or the model does not support what the
            recipe asks for.
        RicciqError: there is not enough memory for a step.
        UsageError: the state was saved by another number of processes.
        ValueError: the recipe needs calibration images and none are given, or there is no folder to
            resume from.
        Stopped: the user asked to stop; the state is saved.
    """
    model, teacher = network_of(model), None if teacher is None else network_of(teacher)
    if folder is None:
        if resume:
            raise ValueError("resume is True and folder is None; give the folder of the run")
        with scratch_folder() as scratch:
            kept = RunFolder(scratch)
            state = finetune(
                model,
                fit,
                holdout,
                recipe,
                correction,
                device=device,
                folder=kept,
                teacher=teacher,
                metadata=metadata,
                journal=journal,
                calibration_images=calibration_images,
                world=world,
                first_steps=first_steps,
            )
            if kept.best.is_file():
                load_model_state(model, load_tensors(kept.best)[0], kept.best)
        return state
    world, journal = world or World(), journal or Journal()
    correction = correction or correction_of(recipe)
    device = device or next(model.parameters()).device
    if calibration_images is None:
        if recipe.training.progressive or recipe.training.reestimate_bn:
            raise ValueError(
                "calibration_images is None; the recipe's progressive or reestimate_bn needs them"
            )
        calibration_images = tuple
    with Trainer(model, recipe, correction, device, len(fit), teacher, world) as trainer:
        running = _Running(trainer, folder, recipe, metadata, fit.batch_size or 1)
        if resume:
            running.restore(world.from_first(lambda: last_state(folder, journal)))
        # Every step seeds the generator; the caller's state is restored.
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            stopping_between_steps(world) as stopping,
        ):
            try:
                while running.state.epoch < recipe.training.epochs:
                    trainer.enter(running.state.epoch, calibration_images)
                    running.train(fit, stopping, journal, first_steps)
                    trainer.reestimate(calibration_images)
                    trainer.share_averages()
                    batches = stopping.watch(holdout, alike=False)
                    held = evaluate({"holdout": trainer.predict}, batches)["holdout"]
                    running.end_epoch(pooled(world.gather(held)))
                    journal.say(running.history.describe(recipe.training.epochs))
                    running.advise(fit, journal)
                    stopping.check()
            except Stopped:
                running.save()
                raise
            finally:
                close(fit)
    return running.state


class _Running:
    """Training until it ends or is interrupted: its state, and the files it writes."""

    def __init__(
        self,
        trainer: Trainer,
        folder: RunFolder,
        recipe: Recipe,
        metadata: RunMetadata | None,
        batch_size: int,
    ) -> None:
        self.trainer, self.folder, self.metadata = trainer, folder, metadata
        self.settings, self.world = recipe.training, trainer.world
        self.state = TrainingState(batch_size=batch_size, processes=self.world.size)
        self.tally, self.history = Tally(), History()
        self.saved_at = time.monotonic()
        self.advised = False

    def restore(self, saved: State | None) -> None:
        """Resume from a state; do nothing without one.

        Raises:
            CheckpointError: the state is damaged or of another version.
            UsageError: it was saved by another number of processes.
        """
        if saved is None:
            return
        trainer = self.trainer
        self.state = TrainingState.of(saved)
        restore_training_state(trainer.changing, trainer.optimizer, saved)
        if self.state.processes != self.world.size:
            raise UsageError(
                f"{saved.path} was saved by {self.state.processes} processes, and this run has "
                f"{self.world.size}; start as many, or start again with --overwrite"
            )
        self.tally = Tally.from_dict(self.state.tally)
        self.history = History.read(self.folder, self.state.epoch)
        trainer.set_stage(self.state.stage)
        if self.state.scaler:
            trainer.scaler.load_state_dict(self.state.scaler)

    def train(
        self,
        fit: DataLoader[Batch],
        stopping: Stopping,
        journal: Journal,
        first_steps: FirstSteps | None,
    ) -> None:
        """Train on the rest of an epoch, and measure the geometry at its last step.

        Args:
            fit: training batches.
            stopping: ends training between two steps if the user asks for it.
            journal: shows a progress bar.
            first_steps: times the first steps.

        Raises:
            DivergedError: too many steps in a row had no finite gradients.
            RicciqError: there is not enough memory for a step.
        """
        state, tally = self.state, self.tally
        set_epoch(fit, state.epoch, state.batch)
        self.trainer.begin_epoch()
        steps = math.ceil(len(fit) / self.settings.grad_accum_steps)
        title = f"epoch {state.epoch + 1}/{self.settings.epochs}"
        started = time.perf_counter()
        # Closed, so that worker processes end before this one, however the loop ends.
        grouped = closing(_grouped(fit, self.settings.grad_accum_steps, tally))
        with grouped as groups, journal.bar(title, steps) as advance:
            for number, batches in enumerate(stopping.watch(groups), start=1):
                finite = self._step(batches, measure=number == steps)
                state.steps += 1
                state.batch += len(batches)
                state.bad_in_a_row = 0 if finite else state.bad_in_a_row + 1
                if state.bad_in_a_row >= MAX_BAD_STEPS:
                    raise DivergedError(
                        f"training gave no finite gradients for {MAX_BAD_STEPS} steps in a row; "
                        f"lower --lr {self.settings.lr}"
                    )
                now = time.perf_counter()
                tally.seconds += now - started
                if first_steps is not None:
                    left = self.trainer.updates - state.steps
                    epochs = self.settings.epochs - state.epoch
                    of_epoch = self.trainer.updates_per_epoch  # `steps` are fewer after resuming
                    first_steps.add(now - started, left, epochs, of_epoch)
                    now = time.perf_counter()
                started = now
                advance(tally.describe)
                if time.monotonic() - self.saved_at > 60 * self.settings.save_minutes:
                    self.save()

    def _step(self, batches: list[Batch], measure: bool) -> bool:
        """One step of the trainer; returns whether gradients were finite."""
        finite = self.trainer.step(batches, self.tally, self.state.steps, measure)
        if measure:
            geometry = self.trainer.geometry.items()
            self.state.geometry = {name: measured._asdict() for name, measured in geometry}
        return finite

    def end_epoch(self, held: Metrics) -> None:
        """Write the results of an epoch: the state last, since it marks the epoch as finished."""
        state, tally = self.state, self.tally.over(self.world)
        state.epoch += 1
        rate = self.trainer.optimizer.param_groups[0]["lr"]
        changed = self.trainer.codes.changed_share()
        self.history.add(state.epoch, tally, held, rate, state.geometry, changed)
        state.images += tally.images
        state.seconds += tally.seconds
        state.skipped += tally.bad
        state.batch, state.geometry, self.tally = 0, {}, Tally()
        better = False
        if self.trainer.progressions[0].is_last(state.epoch - 1):
            state.best_top1 = max(state.best_top1, held.top1)
            better = held.top1 >= state.best_top1 - _standard_error(state.best_top1, held.samples)
        if better:
            state.chosen_epoch, state.chosen_top1 = state.epoch, held.top1
        if self.world.is_first:
            if better:
                stored = self.metadata.to_dict() if self.metadata else {}
                chosen = {**stored, "epoch": state.epoch, "holdout_top1": held.top1}
                save_tensors(self.folder.best, self.trainer.outcome.state_dict(), chosen)
            self.history.write(self.folder)
        self.save()

    def advise(self, fit: DataLoader[Batch], journal: Journal) -> None:
        """Say what helps against waiting for images, once."""
        share = self.history.summary[-1]["waiting_share"]
        remedy = against_waiting(fit, self.world)
        if self.advised or share <= LARGEST_WAIT or remedy is None:
            return
        self.advised = True
        journal.say(f"{100 * share:.0f} % of the time was spent waiting for images; {remedy}")

    def save(self) -> None:
        """Save the state for a resumed run, and keep the previous one."""
        self.saved_at = time.monotonic()
        if not self.world.is_first:
            return
        state, trainer, folder = self.state, self.trainer, self.folder
        state.tally, state.scaler = self.tally.to_dict(), trainer.scaler.state_dict()
        state.stage = trainer.stage
        tensors, metadata = training_state(trainer.changing, trainer.optimizer, vars(state))
        save_tensors(folder.last, tensors, metadata, previous=folder.previous)
        write_atomically(folder.state, json.dumps(vars(state), indent=1) + "\n")


def _grouped(items: Iterable[T], size: int, tally: Tally) -> Generator[list[T]]:
    """Lists of ``size`` items; the last may be shorter. The time they take goes to the tally."""
    rest = iter(items)
    while True:
        started = time.perf_counter()
        with record_function("data"):
            group = list(islice(rest, size))
        tally.waiting += time.perf_counter() - started
        if not group:
            return
        yield group


def _standard_error(percent: float, samples: int) -> float:
    """Standard error of an accuracy on so many samples, in percentage points.

    A hold-out of a few hundred images cannot distinguish epochs that differ by less. Of those the
    latest is chosen (the one-standard-error rule of Breiman et al. 1984), since a schedule that
    decays to zero is meant to end well.
    """
    # With two hits and two misses more (Agresti & Coull 1998): 100 % on a few images is not
    # certain, and a single image more or less never tells epochs apart.
    more = samples + 4
    share = (percent / 100 * samples + 2) / more
    return 100 * math.sqrt(share * (1 - share) / more)
