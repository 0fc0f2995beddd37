"""Estimators by name, made from their entries in `ricciq.estimators.catalog`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ricciq.errors import RecipeError
from ricciq.estimators.apply import Correction
from ricciq.estimators.base import Estimator
from ricciq.estimators.catalog import CATALOG, Target
from ricciq.estimators.ricci_flow import RicciFlow


def named_correction(
    name: str, changes: Mapping[str, Any], target: Target | None = None
) -> Correction:
    """What a method does to gradients and to optimizer steps.

    Args:
        name: a key of `CATALOG`.
        changes: settings that differ from those of the name.
        target: whose gradients are corrected; by default, those that the method is for.

    Raises:
        RecipeError: the method has no setting of that name, or a value is invalid.
    """
    entry = CATALOG[name]
    settings = entry.defaults
    if unknown := [key for key in changes if key not in settings]:
        raise RecipeError(
            f"method {name} has no {', '.join(unknown)}; remove it or choose another method"
        )
    try:
        made = entry.load()(**settings | dict(changes))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"method {name} is invalid: {error}") from None
    target = target or entry.target
    if isinstance(made, RicciFlow):
        return made.as_correction(target)
    return Correction(cast(Estimator, made), target)


def named_estimator(name: str, changes: Mapping[str, Any]) -> Estimator:
    """The estimator of a method.

    Args:
        name: a key of `CATALOG`.
        changes: settings that differ from those of the name.

    Raises:
        RecipeError: the method has no setting of that name, or a value is invalid.
    """
    return named_correction(name, changes).estimator


METHODS: dict[str, Estimator] = {name: named_estimator(name, {}) for name in CATALOG}
"""The estimator of each method with the settings of its name."""
