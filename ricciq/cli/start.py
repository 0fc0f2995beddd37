"""How a long command starts: imports, a journal on stderr, and handlers of signals."""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from ricciq.errors import RicciqError, on_one_line
from ricciq.system.allocator import keep_freed_memory

if TYPE_CHECKING:
    from ricciq.system.journal import Journal


@contextmanager
def importing() -> Iterator[None]:
    """Import torch and what needs it without Python's garbage collector.

    It would look at a million new objects again and again, also when the process ends, although
    hardly any of them is garbage: that takes a third of the time. It leaves them out from then on.

    Raises:
        RicciqError: a library cannot be imported.
    """
    first = "torch" not in sys.modules  # else they belong to whoever imported it
    if first:
        gc.disable()
    try:
        yield
    except Exception as error:  # a broken library may raise anything
        raise RicciqError(
            f"a library cannot be imported ({on_one_line(error, 160)}); `ricciq doctor` says which "
            "one, and what to do"
        ) from error
    finally:
        if first:
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
        logging.disable()  # of all libraries, also those with handlers of their own
    return quiet


def begin(messages: list[str], quiet: bool) -> Journal:
    """Open a journal on stderr, and let other signals stop the command as Ctrl-C does.

    Memory that is freed stays with the process from then on.

    Args:
        messages: what the journal shows first.
        quiet: show nothing.
    """
    from ricciq.system.interrupts import interrupt_on_signals
    from ricciq.system.journal import Journal

    journal = Journal(Console(stderr=True) if is_first() and not quiet else None)
    for message in messages:
        journal.say(message)
    interrupt_on_signals()
    keep_freed_memory()
    return journal
