"""What a verb that takes long starts with: a journal on stderr, and signals that stop it."""

from __future__ import annotations

import logging
import signal
import warnings
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ricciq.system.offline import forbid_telemetry

if TYPE_CHECKING:
    from ricciq.system.journal import Journal


def is_first() -> bool:
    """Whether this is the process that speaks, of those that torchrun started."""
    from ricciq.system.distributed import process_number

    return process_number()[0] == 0


def hushed(quiet: bool) -> bool:
    """Keep the warnings of libraries from stderr where nothing but errors is to be said.

    Args:
        quiet: whether that is asked for.

    Returns:
        The same.
    """
    if quiet:
        warnings.simplefilter("ignore")
        # Where there is no handler at all, Python shows what libraries log.
        logging.getLogger().addHandler(logging.NullHandler())
        forbid_telemetry()  # or onnxruntime tells where it cannot keep its identifier
    return quiet


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
