"""Runs in lockstep: all meet before any goes on, and an exception ends all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ricciq.training.lockstep import Lockstep, PartedError


def test_all_runs_reach_a_point_before_any_goes_on() -> None:
    events: list[Any] = []

    def handle(key: str, values: list[int]) -> list[int]:
        events.append((key, values))
        return [sum(values)] * len(values)

    lockstep = Lockstep(handle)

    def run(given: int) -> None:
        total = lockstep.meet("first", given)
        events.append(given)
        events.append(lockstep.meet("second", total + given))

    lockstep.run(run, [1, 2, 3])
    second = 3 * 6 + 6
    assert events == [("first", [1, 2, 3]), 1, 2, 3, ("second", [7, 8, 9]), *[second] * 3]


def test_a_function_that_meets_nowhere_just_runs() -> None:
    seen: list[int] = []
    Lockstep(lambda _, values: values).run(seen.append, [1, 2])
    assert seen == [1, 2]


@pytest.mark.parametrize("where", ["run", "handle"])
def test_an_exception_ends_all_runs(where: str) -> None:
    ended: list[int] = []

    def handle(_: str, values: list[int]) -> Sequence[int]:
        if where == "handle":
            raise ZeroDivisionError
        return values

    lockstep = Lockstep(handle)

    def run(given: int) -> None:
        try:
            lockstep.meet("here", given)
            if given == 2:
                raise ZeroDivisionError
            lockstep.meet("there", given)
        finally:
            ended.append(given)

    with pytest.raises(ZeroDivisionError):
        lockstep.run(run, [1, 2, 3])
    assert sorted(ended) == [1, 2, 3]


def test_the_blocks_of_runs_that_are_ended_leave_nothing_behind() -> None:
    def stop(_: str, values: list[int]) -> Sequence[int]:
        if values:
            raise KeyboardInterrupt
        return values

    lockstep = Lockstep(stop)

    def run(given: int) -> None:
        with torch.no_grad():
            lockstep.meet("here", given)

    assert torch.is_grad_enabled()
    with pytest.raises(KeyboardInterrupt):
        lockstep.run(run, [1, 2, 3])
    assert torch.is_grad_enabled()


def test_runs_that_part_are_an_error() -> None:
    lockstep = Lockstep(lambda _, values: values)
    with pytest.raises(PartedError, match="reached a, "):
        lockstep.run(lambda given: lockstep.meet(given, None), ["a", "b"])
    with pytest.raises(PartedError, match="reached a, "):
        lockstep.run(lambda given: given and lockstep.meet("a", None), [True, False])
