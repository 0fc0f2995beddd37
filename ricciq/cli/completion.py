"""Shell completion: the values of arguments and options.

A completion that fails offers nothing and prints nothing, so that the command line stays intact.
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
    """Complete a word to the names that begin with it."""

    def complete(incomplete: str) -> list[str]:
        try:
            with redirect_stderr(io.StringIO()):  # libraries warn while they are imported
                return [name for name in names() if name.startswith(incomplete)]
        except Exception:  # the command itself will report a broken installation
            return []

    return complete


def some_of(names: Callable[[], Iterable[str]]) -> Completion:
    """Complete the last word of a comma-separated list."""
    complete_one = one_of(names)

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in complete_one(last)]

    return complete


def method_names() -> Iterable[str]:
    """Values of --method."""
    return CATALOG


def recipe_names() -> Iterable[str]:
    """Names of the shipped recipes."""
    from ricciq.recipe import shipped_recipes

    return shipped_recipes()


def model_names() -> list[str]:
    """Models of timm and of this package, with and without the tags of their weights.

    Importing timm takes seconds, so the list is kept in the user's cache folder, in a file for each
    pair of versions.
    """
    cached = _cache_folder() / f"models-timm-{version('timm')}-ricciq-{__version__}.txt"
    with suppress(OSError, UnicodeDecodeError):
        return cached.read_text(encoding="utf-8").splitlines()
    from timm import list_models

    import ricciq.models.bundled  # noqa: F401  registers them
    from ricciq.system.files import write_atomically

    names = sorted({*list_models(), *list_models(pretrained=True)})
    with suppress(OSError, RicciqError):  # without a cache, the next TAB is as slow
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, "\n".join(names))
    return names


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ricciq"
