"""The fine-tuning loop: epoch after epoch, the states that a run goes on from, and when it ends."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch import nn
from torch.profiler import record_function
from torch.utils.data import DataLoader

from ricciq.data.loader import Batch, set_epoch
from ricciq.errors import DivergedError, RicciqError, UsageError
from ricciq.estimators.apply import Correction
from ricciq.estimators.registry import named_correction
from ricciq.evaluation import Metrics, evaluate, pooled
from ricciq.recipe import Recipe
from ricciq.runs.folder import RunFolder
from ricciq.runs.metadata import RunMetadata
from ricciq.system.distributed import World
from ricciq.system.files import write_atomically
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
from ricciq.training.memory import halve_until, is_out_of_memory
from ricciq.training.metrics import History, Tally
from ricciq.training.state import Progressed, last_state
from ricciq.training.step import Pictures, Trainer

MAX_BAD_STEPS = 20
"""Steps in a row without finite gradients after which training gives up."""
T = TypeVar("T")


def correction_of(recipe: Recipe) -> Correction:
    """The gradient correction of a recipe.

    Args:
        recipe: its ``method`` names the estimator.

    Returns:
        What happens to the gradients between backward and step.

    Raises:
        RecipeError: there is no such estimator, or a setting of it is invalid.
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
    pictures: Pictures | None = None,
    resume: bool = False,
    world: World | None = None,
) -> Progressed:
    """Train a model in place: a converted, calibrated one, or one in float.

    Whatever ends it, the estimator leaves no hook, slope or other function on the model.

    Args:
        model: on ``device``; any classifier, not only timm's.
        fit: training batches; this process's share of them.
        holdout: batches held out of the training data, to choose the best epoch with; its share.
        recipe: schedule, batch size, mixed precision, compilation and seed.
        correction: what happens to the gradients between backward and step; by default what the
            recipe's method says.
        device: where to compute; by default where the model is.
        folder: receives the states, summary.csv and geometry.csv from the first process. Without
            one nothing stays on disk, and the model ends with the best epoch's weights.
        teacher: the float model to distil from, on ``device``.
        metadata: stored beside the best epoch's weights.
        journal: where progress is shown; by default nowhere.
        pictures: what to calibrate on, where the recipe has stages or estimates BatchNorm anew.
        resume: go on from the folder's last state.
        world: the processes that train together.

    Returns:
        How far it came; ``folder.best`` holds the best epoch's weights, the model the last one's.

    Raises:
        DivergedError: gradients were not finite for `MAX_BAD_STEPS` steps in a row.
        RecipeError: timm knows no such optimizer or schedule.
        RicciqError: there is not enough memory for a step.
        UsageError: the state is that of another number of processes.
        ValueError: there are no pictures, and the recipe needs them; or there is no folder to
            resume from.
        Stopped: the user asked to stop; the state is saved.
    """
    if folder is None:
        if resume:
            raise ValueError("resume is True and folder is None; give the folder of the run")
        with TemporaryDirectory() as scratch:
            kept = RunFolder(Path(scratch))
            done = finetune(
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
                pictures=pictures,
                world=world,
            )
            if kept.best.is_file():
                load_model_state(model, load_tensors(kept.best)[0], kept.best)
        return done
    world, journal = world or World(), journal or Journal()
    correction = correction or correction_of(recipe)
    device = device or next(model.parameters()).device
    if pictures is None:
        if recipe.training.progressive or recipe.training.reestimate_bn:
            raise ValueError("pictures is None; the recipe's progressive or reestimate_bn needs it")
        pictures = tuple
    with Trainer(model, recipe, correction, device, len(fit), teacher, world) as trainer:
        sitting = _Sitting(trainer, folder, recipe, metadata, fit.batch_size or 1)
        if resume:
            sitting.restore(world.from_first(lambda: last_state(folder, journal)))
        # Every step seeds the generator; the caller's is to stay as it is.
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            stopping_between_steps(world) as stopping,
        ):
            try:
                while sitting.done.epoch < recipe.training.epochs:
                    trainer.enter(sitting.done.epoch, pictures)
                    sitting.train(fit, stopping, journal)
                    trainer.reestimate(pictures)
                    trainer.share_averages()
                    batches = stopping.watch(holdout, alike=False)
                    held = evaluate({"holdout": trainer.predict}, batches)["holdout"]
                    sitting.end_epoch(pooled(world.gather(held)))
                    journal.say(sitting.history.describe(recipe.training.epochs))
                    stopping.check()
            except Stopped:
                sitting.save()
                raise
    return sitting.done


class _Sitting:
    """Work on a run until it ends or is stopped: where it stands, and what it leaves on disk."""

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
        self.done = Progressed(batch_size=batch_size, processes=self.world.size)
        self.tally, self.history = Tally(), History()
        self.saved = time.monotonic()

    def restore(self, state: State | None) -> None:
        """Go on from a state; from the start without one."""
        if state is None:
            return
        trainer = self.trainer
        self.done = Progressed.of(state)
        restore_training_state(trainer.changing, trainer.optimizer, state)
        if self.done.processes != self.world.size:
            raise UsageError(
                f"{state.path} is the state of {self.done.processes} processes and was given to "
                f"{self.world.size}; start as many, or start again with --overwrite"
            )
        self.tally = Tally.from_dict(self.done.tally)
        self.history = History.read(self.folder, self.done.epoch)
        trainer.set_stage(self.done.stage)
        if self.done.scaler:
            trainer.scaler.load_state_dict(self.done.scaler)

    def train(self, fit: DataLoader[Batch], stopping: Stopping, journal: Journal) -> None:
        """Train on what is left of an epoch; the geometry is measured at its last step."""
        done, tally = self.done, self.tally
        set_epoch(fit, done.epoch, done.batch)
        self.trainer.begin_epoch()
        steps = math.ceil(len(fit) / self.settings.grad_accum_steps)
        title = f"epoch {done.epoch + 1}/{self.settings.epochs}"
        started = time.perf_counter()
        # Closed, so that workers end before the process does, whatever ends the loop.
        grouped = closing(_grouped(fit, self.settings.grad_accum_steps))
        with grouped as groups, journal.bar(title, steps) as advance:
            for number, batches in enumerate(stopping.watch(groups), start=1):
                finite = self._step(batches, measure=number == steps)
                done.steps += 1
                done.batch += len(batches)
                done.bad_in_a_row = 0 if finite else done.bad_in_a_row + 1
                if done.bad_in_a_row >= MAX_BAD_STEPS:
                    raise DivergedError(
                        f"training gave no finite gradients for {MAX_BAD_STEPS} steps in a row; "
                        f"lower --lr {self.settings.lr}"
                    )
                now = time.perf_counter()
                tally.seconds += now - started
                started = now
                advance(tally.describe)
                if time.monotonic() - self.saved > 60 * self.settings.save_minutes:
                    self.save()

    def _step(self, batches: list[Batch], measure: bool) -> bool:
        """One step of the trainer.

        Raises:
            RicciqError: there is not enough memory for it; the message says for what there is.
        """
        trainer = self.trainer
        try:
            finite = trainer.step(batches, self.tally, self.done.steps, measure)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            if measure:
                geometry = trainer.geometry.items()
                self.done.geometry = {name: measured._asdict() for name, measured in geometry}
            return finite
        images, targets = batches[0]
        half = len(targets) // 2
        size = halve_until(lambda n: trainer.fits((images[:n], targets[:n])), half)
        remedy = "choose a smaller model or input size"
        if size:
            steps = -(-len(targets) * self.settings.grad_accum_steps // size)
            remedy = f"give --batch-size {size}, and --grad-accum-steps {steps} for steps as large"
        raise RicciqError(
            f"the memory of {trainer.device} is not enough for a step with batch size "
            f"{len(targets)}, {f'but {size} fitted' if size else 'nor for one picture'}; {remedy}"
        )

    def end_epoch(self, held: Metrics) -> None:
        """Write the epoch's results; the state last, since it is what says that it is done."""
        done, tally = self.done, self.tally.over(self.world)
        done.epoch += 1
        rate = self.trainer.optimizer.param_groups[0]["lr"]
        changed = self.trainer.codes.changed_share()
        self.history.add(done.epoch, tally, held, rate, done.geometry, changed)
        done.images += tally.images
        done.seconds += tally.seconds
        done.skipped += tally.bad
        done.batch, done.geometry, self.tally = 0, {}, Tally()
        better = False
        if self.trainer.progressions[0].is_last(done.epoch - 1):
            done.best_top1 = max(done.best_top1, held.top1)
            better = held.top1 >= done.best_top1 - _standard_error(done.best_top1, held.samples)
        if better:
            done.chosen_epoch, done.chosen_top1 = done.epoch, held.top1
        if self.world.is_first:
            if better:
                stored = self.metadata.to_dict() if self.metadata else {}
                chosen = {**stored, "epoch": done.epoch, "holdout_top1": held.top1}
                save_tensors(self.folder.best, self.trainer.outcome.state_dict(), chosen)
            self.history.write(self.folder)
        self.save()

    def save(self) -> None:
        """Put the state where a resumed run finds it, and keep the one before."""
        self.saved = time.monotonic()
        if not self.world.is_first:
            return
        done, trainer, folder = self.done, self.trainer, self.folder
        done.tally, done.scaler = self.tally.to_dict(), trainer.scaler.state_dict()
        done.stage = trainer.stage
        tensors, metadata = training_state(trainer.changing, trainer.optimizer, vars(done))
        save_tensors(folder.last, tensors, metadata, previous=folder.previous)
        write_atomically(folder.state, json.dumps(vars(done), indent=1) + "\n")


def _grouped(items: Iterable[T], size: int) -> Generator[list[T]]:
    """Lists of so many; the last may be shorter."""
    rest = iter(items)
    while True:
        with record_function("data"):
            group = list(islice(rest, size))
        if not group:
            return
        yield group


def _standard_error(percent: float, samples: int) -> float:
    """Of a share measured on so many samples, in percent points.

    A hold-out of a few hundred pictures cannot tell epochs apart that differ by less; among those
    the latest is taken (the one-standard-error rule of Breiman et al. 1984), since a schedule that
    ends near zero is meant to end well.
    """
    # Laplace's rule of succession: a share of 100 % on a few pictures is not certain either.
    share = (percent / 100 * samples + 1) / (samples + 2)
    return 100 * math.sqrt(share * (1 - share) / samples)
