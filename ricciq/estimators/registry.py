"""Estimators by name, made of their entries in `ricciq.estimators.catalog`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ricciq.errors import RecipeError
from ricciq.estimators.base import Estimator
from ricciq.estimators.catalog import CATALOG


def named_estimator(name: str, changes: Mapping[str, Any]) -> Estimator:
    """The estimator that a method name stands for, with some of its settings changed.

    Args:
        name: a key of `CATALOG`.
        changes: settings by name.

    Returns:
        The estimator.

    Raises:
        RecipeError: a value is out of bounds, or the method has no setting of that name.
    """
    entry = CATALOG[name]
    settings = entry.defaults
    if unknown := [key for key in changes if key not in settings]:
        raise RecipeError(
            f"method {name} has no {', '.join(unknown)}; remove it or choose another method"
        )
    try:
        return cast(Estimator, entry.load()(**settings | dict(changes)))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"method {name} does not hold: {error}") from None


METHODS: dict[str, Estimator] = {name: named_estimator(name, {}) for name in CATALOG}
"""Each method with its own settings."""
