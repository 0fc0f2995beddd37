"""The pace of the first steps, and when training reports it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from digits_run import RECIPE, STEPS, Run

from ricciq.training.pace import FirstSteps, Pace


def test_the_pace_is_the_mean_without_the_first_third():
    found: list[Pace] = []
    first = FirstSteps(found.append, 6)
    for number, seconds in enumerate([90.0, 50.0, 1.0, 1.0, 1.0, 5.0, 70.0, 80.0], start=1):
        assert len(found) == (number > 6)
        first.add(seconds, steps=100 - number, epochs=3, of_epoch=40)
    assert found == [Pace(2.0, 94, 3, 40)]


def test_training_reports_what_is_left_also_after_it_was_resumed(tmp_path):
    found: list[Pace] = []

    def stop(pace: Pace) -> None:
        found.append(pace)
        raise ZeroDivisionError

    run = Run(tmp_path, RECIPE.override({"training.epochs": 3}))
    with pytest.raises(ZeroDivisionError):
        run.train(first_steps=FirstSteps(stop, STEPS + 1))
    run.train(
        first_steps=FirstSteps(found.append, 2), resume=True
    )  # from the end of the first epoch
    left = [(2 * STEPS - 1, 2, STEPS), (2 * STEPS - 2, 2, STEPS)]
    assert [pace[1:] for pace in found] == left
    assert all(pace.step_seconds > 0 for pace in found)


def test_an_epoch_has_all_its_steps_when_resumed_inside_it(tmp_path):
    found: list[Pace] = []

    def stop(_: Pace) -> None:
        raise ZeroDivisionError

    run = Run(tmp_path, RECIPE.override({"training.epochs": 2, "training.save_minutes": 0}))
    with pytest.raises(ZeroDivisionError):
        run.train(first_steps=FirstSteps(stop, 3))  # the state is that of two steps
    run.train(first_steps=FirstSteps(found.append, 2), resume=True)
    assert [pace[1:] for pace in found] == [(2 * STEPS - 4, 2, STEPS)]


def test_the_time_of_the_report_is_not_training(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=time.monotonic, perf_counter=lambda: clock.now)
    monkeypatch.setattr("ricciq.training.loop.time", clock)

    def report(_: Pace) -> None:
        clock.now += 1000

    run = Run(tmp_path, RECIPE.override({"training.epochs": 1}))
    assert run.train(first_steps=FirstSteps(report, 2)).seconds == 0
    assert clock.now == 1000
