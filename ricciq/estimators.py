"""Gradient estimators by name, and the seam between the training loop and the geometry.

The straight-through estimator hands the weights the gradient taken at their rounded values. The
other methods correct that gradient with the metric of `ricciq.ricci` before the optimizer sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ricciq.errors import RecipeError
from ricciq.quantizer import WeightQuantizer
from ricciq.ricci import Geometry, RicciFlow

METHODS: dict[str, RicciFlow | None] = {
    "ricci": RicciFlow(),
    "ste": None,
    "lne": RicciFlow(flow="none", correction="natural"),
    "project": RicciFlow(correction="project"),
}
"""What each method name stands for; None leaves the straight-through gradient as it is."""


class DiscreteWeight(NamedTuple):
    """A weight under training and the quantizer it goes through."""

    name: str
    weight: Tensor
    quantizer: WeightQuantizer


def named_flow(name: str, changes: Mapping[str, Any]) -> RicciFlow | None:
    """The flow a method name stands for, with some of its values changed.

    Raises:
        RecipeError: the values do not hold, or the method has none to change.
    """
    flow = METHODS[name]
    if not changes:
        return flow
    if flow is None:
        keys = ", ".join(changes)
        raise RecipeError(f"method {name} has no {keys}; remove it or choose another method")
    values = {field: getattr(flow, field) for field in flow.__dataclass_fields__}
    try:
        return RicciFlow(**{**values, **changes})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"method {name} does not hold: {error}") from None


@dataclass(frozen=True)
class Correction:
    """Applies a flow to the gradients of discrete weights, in place.

    Attributes:
        flow: what to apply, or None for the plain straight-through estimator.
    """

    flow: RicciFlow | None

    @torch.no_grad()
    def __call__(self, weights: Iterable[DiscreteWeight]) -> None:
        """Correct every weight that has a gradient; call after backward and before clipping."""
        if self.flow is None:
            return
        for _, weight, quantizer in weights:
            if weight.grad is not None:
                xi, mask = self._coordinate(self.flow, weight, quantizer)
                gradient = weight.grad.flatten(1)
                corrected = self.flow.correct(gradient, xi, mask=mask, kernel=_kernel(weight))
                weight.grad.copy_(corrected.view_as(weight))

    @torch.no_grad()
    def measure(self, weights: Iterable[DiscreteWeight]) -> dict[str, Geometry]:
        """The geometry of each weight's uncorrected gradient; call where the correction would be.

        The plain straight-through estimator is measured with the default flow, uncorrected.
        """
        flow = self.flow or RicciFlow()
        rows = {}
        for name, weight, quantizer in weights:
            if weight.grad is not None:
                xi, mask = self._coordinate(flow, weight, quantizer)
                gradient, kernel = weight.grad.flatten(1), _kernel(weight)
                corrected = gradient
                if self.flow is not None:
                    corrected = flow.correct(gradient, xi, mask=mask, kernel=kernel)
                rows[name] = flow.measure(gradient, xi, corrected, kernel=kernel)
        return rows

    @staticmethod
    def _coordinate(
        flow: RicciFlow, weight: Tensor, quantizer: WeightQuantizer
    ) -> tuple[Tensor, Tensor]:
        residual, mask = quantizer.residual(weight)
        if flow.coordinate == "residual":
            return residual, mask
        return quantizer.ratio(weight).flatten(1) * mask, mask


def _kernel(weight: Tensor) -> int:
    """How many weights make a kernel: one input channel's, or one weight of a linear layer."""
    return weight[0, 0].numel()
