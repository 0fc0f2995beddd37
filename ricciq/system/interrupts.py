"""Signals that end a process; in training after the current step, so that its state is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ricciq.system.distributed import World

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""What Ctrl-C, batch systems, and a closed terminal send; Windows has no SIGHUP."""
T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """The user asked to stop, and the current step is finished."""


class Stopping:
    """Records a request to stop; a second signal stops at once."""

    def __init__(self, world: World) -> None:
        self.world, self.asked = world, False

    def watch(self, items: Iterable[T], alike: bool = True) -> Iterator[T]:
        """Iterate over items until the user asks to stop.

        Args:
            items: what the caller processes one by one.
            alike: whether every process has the same number of items. If not, a run with several
                processes does not stop between them.

        Yields:
            The items.

        Raises:
            Stopped: after an item is processed; in all processes, after the same item.
        """
        for item in items:
            yield item
            if alike or self.world.size == 1:
                self.check()

    def check(self) -> None:
        """Stop here if the user asked to; every process must call this.

        Raises:
            Stopped: the user asked to stop any of the processes.
        """
        if self.world.any(self.asked):
            raise Stopped

    def _ask(self, signum: int, frame: Any) -> None:  # noqa: ARG002
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def interrupt_on_signals() -> None:
    """Let the signals of `SIGNALS` raise a KeyboardInterrupt from now on, as Ctrl-C does."""
    for number in heeded():
        signal.signal(number, _interrupt)


def heeded() -> list[signal.Signals]:
    """All of `SIGNALS`, but under nohup not SIGHUP: then a run goes on without its terminal.

    Scripts start jobs in the background with SIGINT ignored; who sends it to one means it.
    """
    ignored = {n for n in SIGNALS if signal.getsignal(n) == signal.SIG_IGN}
    return [number for number in SIGNALS if number == signal.SIGINT or number not in ignored]


def _interrupt(signum: int, frame: Any) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


@contextmanager
def stopping_between_steps(world: World) -> Iterator[Stopping]:
    """Install signal handlers for the duration of a block; only the main thread can have them."""
    stopping = Stopping(world)
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.getsignal(number) for number in heeded()}
    for number in before:
        signal.signal(number, stopping._ask)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
