"""Runs a function on several inputs so that all of them reach a point before any goes on.

A layer can then be handled with what all images give it, and nothing before it runs again. Each
input has a stack of its own (a greenlet); only one of them runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from greenlet import getcurrent, greenlet


class Lockstep:
    """Where runs of the same function wait for each other.

    Attributes:
        handle: called with a key and a value of each run, in order; returns a result for each run.
    """

    def __init__(self, handle: Callable[[Any, list[Any]], Sequence[Any]]) -> None:
        self.handle = handle
        self._handling: greenlet | None = None

    def meet(self, key: Any, value: Any) -> Any:
        """Wait within a run until all runs are here, and return what `handle` has for this one.

        Args:
            key: what is met at; the same in all runs.
            value: what this run brings.
        """
        assert self._handling is not None, "only within a run"
        return self._handling.switch((key, value))

    def run(self, function: Callable[[Any], Any], inputs: Sequence[Any]) -> None:
        """Call a function with each input.

        An exception in a run, or in `handle`, ends all of them.

        Args:
            function: meets at the same points, in the same order, whatever its input.
            inputs: what it is called with.

        Raises:
            RuntimeError: two runs met at different points.
        """
        self._handling = getcurrent()

        def to_the_end(given: Any) -> None:
            function(given)

        runs = [greenlet(to_the_end) for _ in inputs]
        met = [run.switch(given) for run, given in zip(runs, inputs, strict=True)]
        while not all(run.dead for run in runs):
            keys = {None if run.dead else at[0] for run, at in zip(runs, met, strict=True)}
            if len(keys) > 1:
                raise RuntimeError(f"runs in lockstep met at different points: {keys}")
            results = self.handle(keys.pop(), [value for _, value in met])
            met.clear()  # what was met with is kept alive by the runs alone
            met += [run.switch(result) for run, result in zip(runs, results, strict=True)]
