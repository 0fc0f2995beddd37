"""Gradient estimators by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ricciq.errors import RecipeError
from ricciq.estimators.base import Estimator
from ricciq.estimators.elementwise import ElementwiseScaling, ErrorDecay, SoftQuantization
from ricciq.estimators.ricci_flow import RicciFlow
from ricciq.estimators.straight_through import StochasticRounding, StraightThrough

METHODS: dict[str, Estimator] = {
    "ricci": RicciFlow(correction="staircase", time=0.25, max_codes=4, trust=0.2),
    "ste": StraightThrough(),
    "ewgs": ElementwiseScaling(),
    "dsq": SoftQuantization(),
    "ede": ErrorDecay(),
    "lne": RicciFlow(flow="none", correction="natural"),
    "project": RicciFlow(correction="project"),
    "stochastic": StochasticRounding(),
}
"""What each method name stands for."""


def named_estimator(name: str, changes: Mapping[str, Any]) -> Estimator:
    """The estimator a method name stands for, with some of its values changed.

    Raises:
        RecipeError: the values do not hold, or the method has none of that name.
    """
    method: Any = METHODS[name]
    known = {field.name for field in fields(method)}
    if unknown := [key for key in changes if key not in known]:
        raise RecipeError(
            f"method {name} has no {', '.join(unknown)}; remove it or choose another method"
        )
    try:
        changed: Estimator = replace(method, **changes)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"method {name} does not hold: {error}") from None
    return changed
