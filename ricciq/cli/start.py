"""How a long command starts: a journal on stderr, and a handler for SIGTERM."""

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
    """Whether this is the process that prints, of those that torchrun started."""
    from ricciq.system.distributed import process_number

    return process_number()[0] == 0


def silence(quiet: bool) -> bool:
    """Callback of --quiet: keep warnings of libraries from stderr.

    Args:
        quiet: whether --quiet was given.

    Returns:
        The same value.
    """
    if quiet:
        warnings.simplefilter("ignore")
        # Without any handler, Python would print what libraries log.
        logging.getLogger().addHandler(logging.NullHandler())
        forbid_telemetry()  # or onnxruntime prints where it cannot store its identifier
    return quiet


def begin(messages: list[str], quiet: bool) -> Journal:
    """Open a journal on stderr, and let SIGTERM stop the command as Ctrl-C does.

    Args:
        messages: what the journal shows first.
        quiet: show nothing.
    """
    from ricciq.system.journal import Journal

    journal = Journal(Console(stderr=True) if is_first() and not quiet else None)
    for message in messages:
        journal.say(message)
    signal.signal(signal.SIGTERM, _interrupt)
    return journal


def _interrupt(signum: int, frame: Any) -> None:  # noqa: ARG001
    raise KeyboardInterrupt
