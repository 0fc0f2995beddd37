"""How long a run will take: what is counted, what is said, and what the session remembers."""

from __future__ import annotations

import pytest
import torch

from ricciq.recipe import Recipe
from ricciq.report.terminal import time_in_words
from ricciq.training.pace import Pace
from ricciq.workflows import forecast as forecasts
from ricciq.workflows.forecast import (
    Costs,
    float_seconds,
    forecast,
    forecast_from_float,
    time_file,
)
from ricciq.workflows.job import prepare
from ricciq.workflows.probe import probe
from ricciq.workflows.session import Session, in_first_process

SESSION = Session(torch.device("cpu"))
RECIPE = Recipe().override({"model.name": "digits_resnet8", "data.name": "digits", "device": "cpu"})
HOLDOUT, VALIDATION = 72, 360
"""Images of digits."""


def test_every_part_is_counted_once():
    job = prepare(RECIPE, SESSION)
    found = forecast(
        job, Pace(0.5, 1000, 7, 200), Costs(image=0.01, file=0.02, export=4.0), processes=2
    )
    held_out = 7 * HOLDOUT / 2 * 0.01 * forecasts.HOLDOUT
    assert found.training == pytest.approx(500 + held_out)
    assert found.export == 4 * forecasts.EXPORT
    each = 0.01 * forecasts.DEPLOYED + 0.02 * forecasts.FILE
    assert found.evaluation == pytest.approx(VALIDATION * each)
    values = found._replace(start=9.0).to_dict()
    assert (values.pop("step"), values["start"]) == (0.5, 9)
    assert values.pop("whole") == pytest.approx(sum(values.values()))


def test_float_training_is_counted_before_it_starts_and_while_it_runs():
    settings = {"training.epochs": 5, "training.float_epochs": 8}
    job = prepare(RECIPE.override(settings), SESSION)._replace(has_new_head=True)
    session = Session(torch.device("cpu"))
    session.seconds["evaluate_float"] = VALIDATION * 0.01
    held_out, whole, discrete = HOLDOUT * 0.01, 0.5, 0.5 * forecasts.DISCRETE_STEP
    head = 0.5 / forecasts.WHOLE_STEP
    expected = 10 * (2 * head + 8 * whole) + 10 * held_out  # 2 epochs of 10 steps, then 8

    parts = [Pace.of_epochs(head, job.head_epochs, 10), Pace.of_epochs(whole, 8, 10)]
    assert float_seconds(job, parts, 0.01) == pytest.approx(expected)
    # A pace is reported when some steps of an epoch are done.
    in_head = forecast_from_float(job, session, Pace(head, 13, 2, 10), of_head=True)
    assert in_head.float_training == pytest.approx(expected - 7 * head)
    later = forecast_from_float(job, session, Pace(whole, 51, 6, 10), of_head=False)
    assert later.float_training == pytest.approx(51 * whole + 6 * held_out)
    for found in (in_head, later):
        assert found.step == pytest.approx(discrete)
        assert found.training == pytest.approx(50 * discrete + 5 * held_out * forecasts.HOLDOUT)


def test_a_probe_leaves_random_numbers_alone():
    job = prepare(RECIPE, SESSION)
    before = torch.get_rng_state()
    found = probe(job, SESSION, batch_size=8, steps=100)
    assert found.training > 100 * found.step > 0
    assert found.float_training == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_is_timed(exported):
    assert 0 < time_file(exported(32, 32).path, (3, 16, 16)) < 10


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (99.4, "99 s"),
        (100, "2 min"),
        (5940, "99 min"),
        (6000, "1 h 40 min"),
        (7170, "2 h 0 min"),
        (71 * 3600, "71 h 0 min"),
        (73 * 3600, "3 days 1 h"),
    ],
)
def test_times_are_said_in_the_units_that_people_use(seconds, words):
    values = {"start": 0.0, "training": 60.0, "export": 0.0, "evaluation": 5.0, "whole": seconds}
    assert time_in_words(values) == f"{words}: training 60 s, evaluation 5 s"


def test_a_session_remembers_what_a_function_took():
    session = Session(torch.device("cpu"))

    @in_first_process
    def work(given: Session) -> str:
        assert given is session
        return "done"

    assert work(session) == "done"
    assert list(session.seconds) == ["work"]
    assert 0 <= session.seconds["work"] < 10
