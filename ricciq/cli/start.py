"""What a verb that takes long starts with: a journal on stderr, and signals that stop it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from ricciq.system.journal import Journal


def is_first() -> bool:
    """Whether this is the process that speaks, of those that torchrun started."""
    from ricciq.system.distributed import process_number

    return process_number()[0] == 0


def begin(messages: list[str], quiet: bool) -> Journal:
    """A journal on stderr that starts with these messages; SIGTERM stops as Ctrl-C does."""
    from ricciq.system.journal import Journal

    journal = Journal(Console(stderr=True) if is_first() and not quiet else None)
    for message in messages:
        journal.say(message)
    signal.signal(signal.SIGTERM, _interrupt)
    return journal


def _interrupt(signum: int, frame: Any) -> None:  # noqa: ARG001
    raise KeyboardInterrupt
