"""What a shell offers at TAB: names that an argument or an option takes.

A completion that fails offers nothing and says nothing, since it would spoil the command line.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, suppress
from importlib.metadata import version
from pathlib import Path

from ricciq._version import __version__
from ricciq.errors import RicciqError
from ricciq.estimators.catalog import CATALOG

Completion = Callable[[str], list[str]]


def one_of(names: Callable[[], Iterable[str]]) -> Completion:
    """Completes a word to those of these names that begin with it."""

    def complete(incomplete: str) -> list[str]:
        try:
            with redirect_stderr(io.StringIO()):  # libraries warn while they are imported
                return [name for name in names() if name.startswith(incomplete)]
        except Exception:  # a broken installation is told by the command, not by its completion
            return []

    return complete


def some_of(names: Callable[[], Iterable[str]]) -> Completion:
    """As `one_of`, of the last word in a list with commas."""
    complete_one = one_of(names)

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in complete_one(last)]

    return complete


def method_names() -> Iterable[str]:
    """What --method takes."""
    return CATALOG


def recipe_names() -> Iterable[str]:
    """The shipped recipes."""
    from ricciq.recipe import shipped_recipes

    return shipped_recipes()


def model_names() -> list[str]:
    """Models that timm and this package know, with and without the tags of their weights.

    Importing timm takes seconds, so that the list is kept in the user's cache folder, in a file
    named for the versions it is of.
    """
    cached = _cache_folder() / f"models-timm-{version('timm')}-ricciq-{__version__}.txt"
    with suppress(OSError, UnicodeDecodeError):
        return cached.read_text(encoding="utf-8").splitlines()
    from timm import list_models

    import ricciq.models.bundled  # noqa: F401  registers them
    from ricciq.system.files import write_atomically

    names = sorted({*list_models(), *list_models(pretrained=True)})
    with suppress(OSError, RicciqError):  # where it cannot be kept, the next TAB is as slow
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, "\n".join(names))
    return names


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ricciq"
