"""Runs a function on several inputs so that all of them reach a point before any goes on.

A layer can then be handled with what all images give it, and nothing before it runs again. Each
input has a stack of its own (a greenlet); only one of them runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from greenlet import getcurrent, greenlet


class Lockstep:
    """Barriers that all runs of a function reach before any goes on.

    Attributes:
        handle: called with the name of a barrier and a value of each run, in order; returns a
            result for each run.
    """

    def __init__(self, handle: Callable[[Any, list[Any]], Sequence[Any]]) -> None:
        self.handle = handle
        self._handling: greenlet | None = None

    def meet(self, name: Any, value: Any) -> Any:
        """Wait within a run until all runs are here, and return what `handle` has for this one.

        Args:
            name: of the barrier, the same in all runs.
            value: what this run brings.
        """
        assert self._handling is not None, "only within a run"
        return self._handling.switch((name, value))

    def run(self, function: Callable[[Any], Any], inputs: Sequence[Any]) -> None:
        """Call a function with each input.

        An exception in a run, or in `handle`, ends all of them. What the function keeps in places
        that all runs share, such as attributes of a module, they write over each other.

        Args:
            function: reaches the same barriers in the same order, whatever its input.
            inputs: what it is called with.

        Raises:
            PartedError: two runs reached different barriers.
        """
        self._handling = getcurrent()

        def to_the_end(given: Any) -> None:
            function(given)

        runs = [greenlet(to_the_end) for _ in inputs]
        try:
            met = [run.switch(given) for run, given in zip(runs, inputs, strict=True)]
            while not all(run.dead for run in runs):
                names = [None if run.dead else at[0] for run, at in zip(runs, met, strict=True)]
                if len(set(names)) > 1:
                    raise PartedError(names)
                results = self.handle(names[0], [value for _, value in met])
                met.clear()  # so that only the runs hold the values, each until it goes on
                met += [run.switch(result) for run, result in zip(runs, results, strict=True)]
        finally:
            for run in reversed(runs):  # their `with` blocks end now, the last one's first
                if not run.dead:
                    run.throw()
            self._handling = None


class PartedError(Exception):
    """Runs in lockstep reached different barriers.

    Args:
        names: the barrier of each run; None where it has ended.
    """

    def __init__(self, names: Sequence[Any]) -> None:
        super().__init__(f"runs in lockstep reached {', '.join(map(str, dict.fromkeys(names)))}")
        self.names = names
