"""How a long command starts: imports, a journal on stderr, and a handler for SIGTERM."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ricciq.system.allocator import keep_freed_memory
from ricciq.system.offline import forbid_telemetry

if TYPE_CHECKING:
    from ricciq.system.journal import Journal


@contextmanager
def importing() -> Iterator[None]:
    """Import torch and what needs it without Python's garbage collector.

    It would look at a million new objects again and again, also when the process ends, although
    hardly any of them is garbage: that takes a third of the time. It leaves them out from then on.
    """
    if "torch" in sys.modules:  # the objects of whoever imported it are not ours to leave out
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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

    Memory that is freed stays with the process from then on.

    Args:
        messages: what the journal shows first.
        quiet: show nothing.
    """
    from ricciq.system.journal import Journal

    journal = Journal(Console(stderr=True) if is_first() and not quiet else None)
    for message in messages:
        journal.say(message)
    signal.signal(signal.SIGTERM, _interrupt)
    keep_freed_memory()
    return journal


def _interrupt(signum: int, frame: Any) -> None:  # noqa: ARG001
    raise KeyboardInterrupt
