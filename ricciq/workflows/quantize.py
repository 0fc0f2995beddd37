"""The main workflow: from a float model and images to an evaluated low-bit ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ricciq.data.dataset import ImageData
from ricciq.errors import UsageError
from ricciq.recipe import Recipe
from ricciq.report.terminal import time_in_words
from ricciq.system.journal import Journal
from ricciq.training.pace import Pace
from ricciq.workflows.find_bits import choose_bits, find_budget
from ricciq.workflows.forecast import LEAST_SAID, Forecast, forecast_from_float, forecast_rest
from ricciq.workflows.job import prepare
from ricciq.workflows.reference import evaluate_float, export_float
from ricciq.workflows.session import Session, choose_device
from ricciq.workflows.sizing import describe
from ricciq.workflows.train import train
from ricciq.workflows.train_float import train_float

if TYPE_CHECKING:
    from ricciq.report.schema import Report


def run(
    recipe: Recipe,
    output: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    journal: Journal | None = None,
    data: ImageData | None = None,
) -> tuple[Report, Path]:
    """Load, convert, calibrate, fine-tune, export, evaluate the ONNX file, and report.

    Args:
        recipe: what to do.
        output: the run's folder; by default a new one under ``runs``.
        resume: continue an unfinished run of the same recipe.
        overwrite: replace the run in the folder.
        journal: shows progress.
        data: the recipe's data, if they are open already.

    Returns:
        The report, and the run's folder.

    Raises:
        RicciqError: any error that `ricciq.errors` lists. Nothing is written before the data and
            the model are known to be usable.
        InterruptedRunError: the user stopped it.
    """
    with Session.open(
        recipe, output, resume=resume, overwrite=overwrite, journal=journal
    ) as session:
        job = prepare(recipe, session, data=data)
        session.world.from_first(job.data.check_training_images)
        reference = evaluate_float(job, session)
        budget = find_budget(job, session)
        session.begin(recipe, "run folder:")

        def float_under_way(pace: Pace, of_head: bool) -> None:
            _say(forecast_from_float(job, session, pace, of_head), session)

        if float_training := train_float(job, session, under_way=float_under_way):
            reference = evaluate_float(job, session)._replace(training=float_training)
        job = choose_bits(job, budget, session)

        def under_way(model: nn.Module, pace: Pace | None) -> None:
            export_float(job, model, session)
            if pace is not None:
                _say(forecast_rest(job, session, pace), session)

        trained = train(job, session, under_way)
        from ricciq.workflows.finish import export_and_report  # here: it takes a second

        report = export_and_report(job, trained, reference, session)
    return report, session.folder.path


def _say(forecast: Forecast, session: Session) -> None:
    """Say how long the rest of a run takes, unless it is short."""
    if forecast.seconds >= LEAST_SAID:
        session.journal.say(f"left to do: about {time_in_words(forecast.to_dict())}")


def plan_run(
    recipe: Recipe,
    journal: Journal | None = None,
    data: ImageData | None = None,
    *,
    probed: bool = False,
) -> dict[str, Any]:
    """Describe what `run` would do. Nothing is written.

    Args:
        recipe: what to do.
        journal: shows progress; by default nothing is shown.
        data: the recipe's data, if they are open already.
        probed: time some real steps, and say how long the run will take.

    Returns:
        Plain values, as from `ricciq.workflows.sizing.describe`; if steps were timed, also
        ``seconds``, as from `ricciq.workflows.forecast.Forecast.to_dict`.

    Raises:
        RicciqError: the recipe, the data or the model cannot be used.
    """
    if probed and recipe.training.epochs == 0:
        raise UsageError("--probe times training steps, and 0 epochs have none; leave it out")
    session = Session(choose_device(recipe.device), journal=journal)
    measured = recipe.quantization.weight_bits == "auto"  # the widths depend on the weights
    job = prepare(recipe, session, weights=measured, pseudo_labels=False, data=data)
    job = choose_bits(job, find_budget(job, session), session)
    plan = describe(job)
    if probed:
        from ricciq.workflows.probe import probe  # here: what it imports takes a second

        found = probe(job, session, plan["batch_size"], plan["steps"])
        plan["seconds"] = found.to_dict()
    return plan
