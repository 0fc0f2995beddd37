"""Ctrl-C and SIGTERM during training: the step is finished first, so that it can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ricciq.system.distributed import World

SIGNALS = (signal.SIGINT, signal.SIGTERM)
T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """The user asked to stop, and everything is between two steps."""


class Stopping:
    """Remembers that a signal came; one that comes again stops at once."""

    def __init__(self, world: World) -> None:
        self.world, self.asked = world, False

    def watch(self, items: Iterable[T], alike: bool = True) -> Iterator[T]:
        """The items, until the user asks to stop.

        Args:
            items: to be worked on one after the other.
            alike: whether every process has as many; if not, several do not stop among them.

        Raises:
            Stopped: after an item has been worked on; where there are several processes, in all of
                them after the same one.
        """
        for item in items:
            yield item
            if alike or self.world.size == 1:
                self.check()

    def check(self) -> None:
        """Stop here if the user asked to, in any process; all have to come by.

        Raises:
            Stopped: they did.
        """
        if self.world.any(self.asked):
            raise Stopped

    def _ask(self, signum: int, frame: Any) -> None:  # noqa: ARG002
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stopping_between_steps(world: World) -> Iterator[Stopping]:
    """Take signals for the length of a block; elsewhere than in the main thread none arrive."""
    stopping = Stopping(world)
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.signal(number, stopping._ask) for number in SIGNALS}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
