"""Paired study of methods: one recipe, several gradient estimators, the same seeds.

For each seed, all methods start from the same weights and see the same images in the same order, so
differences are taken seed by seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter

from ricciq.data.open import open_data
from ricciq.deploy.links import link
from ricciq.deploy.modules import deploy
from ricciq.errors import (
    DivergedError,
    InputError,
    RecipeError,
    UsageError,
    on_one_line,
)
from ricciq.estimators.registry import named_estimator
from ricciq.evaluation import evaluate
from ricciq.recipe import Recipe
from ricciq.report.plots import draw_curves, draw_seeds, write_png
from ricciq.report.statistics import Row, summarize
from ricciq.runs.folder import StudyFolder
from ricciq.system.distributed import process_number
from ricciq.system.files import write_atomically
from ricciq.system.journal import Journal
from ricciq.system.safe_yaml import parse_yaml
from ricciq.system.tables import read_csv, write_csv
from ricciq.workflows.find_bits import choose_bits, find_budget
from ricciq.workflows.job import prepare
from ricciq.workflows.saved import rebuild
from ricciq.workflows.session import Session
from ricciq.workflows.sizing import describe
from ricciq.workflows.train import train
from ricciq.workflows.train_float import train_float

RESULT = "result.json"
Split = Literal["val", "holdout"]


class Trial(NamedTuple):
    """One run of a study.

    Attributes:
        method: as given to --methods, with changes of its settings.
        lr_scale: factor of the learning rate.
        seed: seed of the run.
    """

    method: str
    lr_scale: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        method = self.method.replace(":", "_")
        return f"{method}-lr{self.lr_scale:g}-seed{self.seed}"

    def recipe(self, base: Recipe) -> Recipe:
        """The study's recipe with this method, rate and seed.

        Raises:
            RecipeError: the method is unknown, or one of its settings is invalid.
        """
        name, *changes = self.method.split(":")
        section: dict[str, Any] = {"name": name}
        others: dict[str, Any] = {}
        for change in changes:
            key, _, value = change.partition("=")
            # A key with a dot belongs to another section, as in ricci:training.ema=0.99.
            part = others if "." in key else section
            try:
                part[key if key != "name" else "name="] = parse_yaml(value)
            except ValueError:
                raise RecipeError(
                    f"--methods {self.method} has no valid value in {change!r}; write time=0.5"
                ) from None
        if name == base.method.name:
            shared = base.method.model_dump(exclude_none=True)
            if "on" in section:  # the old name of `target`
                shared.pop("target", None)
            section = shared | section
        values = base.model_dump() | {"method": section, "seed": self.seed}
        where = f"--methods {self.method}"
        recipe = Recipe.from_values(values, where).replace(others, where)
        recipe = recipe.override({"training.lr": recipe.training.lr * self.lr_scale})
        named_estimator(recipe.method.name, recipe.method.changes)
        return recipe


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: int,
    output: Path | None = None,
    *,
    lr_scales: Sequence[float] = (1.0,),
    split: Split = "val",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    journal: Journal | None = None,
) -> tuple[dict[str, Any], Path]:
    """Train one recipe with several methods and seeds, and compare the results.

    Args:
        recipe: everything but method and seed; its seed is the first one.
        methods: names of `ricciq.estimators.catalog.CATALOG`, each with changes of its settings,
            such as ``"ricci:time=0.5:trust=0.1"``, or of other keys of the recipe, such as
            ``"ricci:training.ema=0.99"``; differences are taken to the first method.
        seeds: number of seeds, at least 2.
        output: the study's folder; by default a new one under ``runs``.
        lr_scales: factors of the learning rate; the methods are compared at each of them.
        split: the images to judge by. Use ``"holdout"`` to choose a method.
        resume: continue a study of the same recipe. Finished runs are not repeated; methods, seeds
            and learning rates may be added.
        overwrite: replace the study in the folder.
        dry_run: only describe the study, and write nothing.
        journal: shows progress.

    Returns:
        The contents of compare.json, or the description of a dry run; and the folder. There,
        rows.csv has a row for each run.

    Raises:
        UsageError: there are fewer than two methods or seeds, or the folder cannot be used.
        RicciqError: any error of a run, except a divergence, which counts as a result.
        InterruptedRunError: the user stopped it.
    """
    if recipe.data.batch_size == "auto":
        raise UsageError(
            "batch_size auto may differ from run to run, but a comparison needs a fixed one; give "
            "a number, such as --batch-size 64"
        )
    if (processes := process_number()[1]) > 1:
        raise UsageError(
            f"compare was started in {processes} processes but runs in one; start it without "
            "torchrun"
        )
    if split == "val" and not open_data(recipe.data.name, recipe.data.dir).labelled:
        raise UsageError(
            f"data {recipe.data.name} has no labels to measure accuracy with; give --split "
            "holdout, which measures agreement with the float model"
        )
    trials = _plan(recipe, methods, seeds, lr_scales)
    about = {
        "schema": 1,
        "model": recipe.model.name,
        "data": recipe.data.name,
        "weight_bits": recipe.quantization.weight_bits,
        "act_bits": recipe.quantization.act_bits,
        "split": split,
        "seeds": [recipe.seed + n for n in range(seeds)],
    }
    with Session.open(
        recipe, output, kind=StudyFolder, resume=resume, overwrite=overwrite, journal=journal
    ) as session:
        folder = StudyFolder(session.folder.path)
        if dry_run:
            run = _planned(trials[0].recipe(recipe), session)
            done = [(folder.trial(trial.name).path / RESULT).is_file() for trial in trials]
            runs = len(trials) - (sum(done) if resume else 0)
            planned = {"methods": [*methods], "lr_scales": [*lr_scales], "runs": runs}
            return {**about, **planned, "dry_run": True, **run}, folder.path
        session.begin(recipe, f"{len(trials)} runs in")
        folder = StudyFolder(session.folder.path)
        rows = [_judged(trial, recipe, folder, split, session) for trial in trials]
        verdict = {**about, "results": list(summarize(rows, methods, lr_scales))}
        write_csv(folder.rows, rows)
        write_png(draw_seeds(rows), folder.seeds_plot)
        write_png(draw_curves(_curves(trials, folder)), folder.curves_plot)
        write_atomically(folder.verdict, json.dumps(verdict, indent=1) + "\n")
    return verdict, folder.path


def _planned(recipe: Recipe, session: Session) -> dict[str, Any]:
    """What one run of the study needs; automatic bits are not searched for."""
    job = prepare(recipe, session, weights=False, pseudo_labels=False)
    run = describe(job)
    return {key: run[key] for key in ("device", "epochs", "steps")}


def _plan(
    recipe: Recipe, methods: Sequence[str], seeds: int, lr_scales: Sequence[float]
) -> list[Trial]:
    """All runs of the study, seed by seed, so that a stopped study has complete pairs."""
    if len(methods) < 2 or len(set(methods)) < len(methods):
        raise UsageError(
            f"--methods {','.join(methods)} leaves nothing to compare; give two or more different "
            "ones, such as ste,ricci"
        )
    if seeds < 2:
        raise UsageError(f"--seeds {seeds} gives no spread to compare with; give 2 or more")
    written = [f"{scale:g}" for scale in lr_scales]
    if len(set(written)) < len(written) or any(not 0 < scale < math.inf for scale in lr_scales):
        raise UsageError(
            f"--lr-scales {','.join(written)} are not different factors; give numbers above 0"
        )
    trials = [
        Trial(method, scale, recipe.seed + n)
        for n in range(seeds)
        for scale in lr_scales
        for method in methods
    ]
    for trial in trials:  # finds a mistake in the last method before the first run
        trial.recipe(recipe)
    return trials


def _judged(trial: Trial, base: Recipe, study: StudyFolder, split: Split, session: Session) -> Row:
    """A run's row with the accuracy to judge it by; the row of a finished run is read."""
    folder = study.trial(trial.name)
    result = folder.path / RESULT
    recipe = trial.recipe(base)
    row: Row
    if result.is_file():
        row = _read_row(result)
    else:
        with session.trial(recipe, folder) as own:
            row = {**trial._asdict(), **_trained(recipe, own, study.float_training)}
            write_atomically(result, json.dumps(row) + "\n")
            for state in (folder.last, folder.previous):  # only the chosen weights are kept
                state.unlink(missing_ok=True)
    if split == "holdout":
        return row | {"top1": row["holdout_top1"], "loss": row["holdout_loss"]}
    if "top1" not in row:
        row |= {
            "top1": row["holdout_top1"],
            "loss": row["holdout_loss"],
        }  # final, if the run diverged
        if not row["diverged"]:
            trained = rebuild(folder.path)
            data = open_data(recipe.data.name, recipe.data.dir)
            data.use_outputs(trained.metadata.class_names, str(folder.best))
            batches = data.loader(
                "val",
                trained.metadata.preprocessing,
                batch_size=recipe.data.known_batch_size,
                workers=recipe.data.workers,
                training=False,
            )
            deployed = link(deploy(trained.model), trained.metadata.preprocessing.input_size).model
            metrics = evaluate({"quantized": deployed}, batches)["quantized"]
            row |= {"top1": metrics.top1, "loss": metrics.loss}
        write_atomically(result, json.dumps(row) + "\n")
    return row


def _read_row(path: Path) -> Row:
    """The stored row of a finished run.

    Raises:
        InputError: the file is damaged.
    """
    try:
        row = TypeAdapter(Row).validate_json(path.read_bytes())
        numbers = [row["holdout_top1"], row["holdout_loss"], row["lr_scale"], row["seed"]]
        numbers += [row[name] for name in ("top1", "loss") if name in row]
        numbers += [row[name] for name in ("train_loss", "seconds") if row[name] is not None]
        if not (isinstance(row["diverged"], bool) and all(map(math.isfinite, numbers))):
            raise ValueError("not all values are numbers")
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = on_one_line(error, 160)
        raise InputError(
            f"{path} is not the result of a run ({reason}); remove it to repeat the run"
        ) from None
    return row


def _trained(recipe: Recipe, session: Session, floats: Path) -> Row:
    """Train one run, or resume it; returns its results on the hold-out."""
    folder, journal = session.folder, session.journal
    journal.say(folder.path.name)
    job = prepare(recipe, session)
    budget = find_budget(job, session)
    session.begin(recipe)
    try:
        # The methods of a study share the float model of a seed.
        train_float(job, session, floats / f"seed{recipe.seed}")
        job = choose_bits(job, budget, session)
        model, done = train(job, session)
    except DivergedError as error:
        journal.say(f"{folder.path.name} diverged: {error}")
        # It counts as a network that has learned nothing, and guesses.
        classes = job.data.num_classes
        guess = {"holdout_top1": 100 / classes, "holdout_loss": math.log(classes)}
        return {"diverged": True, **guess, "train_loss": None, "seconds": None}
    if done.epoch:
        epochs = read_csv(folder.summary, {"holdout_loss": float, "train_loss": float})
        top1, held = done.chosen_top1, epochs[done.chosen_epoch - 1]["holdout_loss"]
        final: float | None = epochs[-1]["train_loss"]
    else:
        found = evaluate({"calibrated": model.eval()}, job.loader("holdout"))["calibrated"]
        top1, held, final = found.top1, found.loss, None
    return {
        "diverged": False,
        "holdout_top1": top1,
        "holdout_loss": held,
        "train_loss": final,
        "seconds": done.seconds,
    }


def _curves(trials: Sequence[Trial], study: StudyFolder) -> dict[str, list[list[float]]]:
    """Hold-out top-1 by epoch, for each method a list per seed, at the first learning rate."""
    curves: dict[str, list[list[float]]] = {}
    for trial in trials:
        if trial.lr_scale == trials[0].lr_scale:
            epochs = read_csv(study.trial(trial.name).summary, {"holdout_top1": float})
            line = [epoch["holdout_top1"] for epoch in epochs]
            curves.setdefault(trial.method, []).append(line)
    return curves
