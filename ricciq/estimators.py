"""Gradient estimators by name: what becomes of a gradient taken at discrete values.

The straight-through estimator hands it to the continuous values as it is. Every other one changes
it by where those values stand in their quantization cells.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ricciq.errors import RecipeError
from ricciq.flow import Coordinate, RicciFlow


class Estimator(Protocol):
    """Changes gradients; `ricciq.flow.RicciFlow` is one."""

    @property
    def coordinate(self) -> Coordinate:
        """What it takes as xi: the place in the quantization cell, or the value in steps."""

    def slope(self, codes: int, samples: int, progress: float) -> Tensor | None:
        """As `ricciq.flow.RicciFlow.slope`; None if there is none, and `correct` is to be used."""

    def correct(
        self,
        gradient: Tensor,
        xi: Tensor,
        kernel: int = 1,
        mask: Tensor | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """A gradient, (rows, n), taken at discrete values, as the continuous ones shall have it.

        Args:
            gradient: (rows, n).
            xi: (rows, n), 0 where the gradient is masked; a residual is 0 at a level and 1 or -1 at
                the threshold above or below it.
            kernel: how many neighbours in a row make a kernel.
            mask: bool, (rows, n), True where the gradient is active; elsewhere it is returned as it
                is, which is 0 unless the layer standardizes its weight.
            progress: share of the training that is done, from 0 to 1.
        """


@runtime_checkable
class Displacing(Protocol):
    """An estimator that changes the forward pass of training too."""

    def place(self, ratio: Tensor, cell: Tensor | float) -> Tensor:
        """What is rounded in the place of numbers, both counted in steps and of one shape.

        Args:
            ratio: any shape.
            cell: how far apart the levels are around each.
        """


@dataclass(frozen=True)
class StraightThrough:
    """The gradient as it is (Bengio et al. 2013, arXiv 1308.3432)."""

    coordinate: ClassVar[Coordinate] = "residual"

    def slope(self, codes: int, samples: int, progress: float) -> Tensor | None:  # noqa: ARG002
        """None."""
        return None

    def correct(
        self,
        gradient: Tensor,
        xi: Tensor,  # noqa: ARG002
        kernel: int = 1,  # noqa: ARG002
        mask: Tensor | None = None,  # noqa: ARG002
        progress: float = 0.0,  # noqa: ARG002
    ) -> Tensor:
        """See `Estimator.correct`."""
        return gradient


class StochasticRounding(StraightThrough):
    """Up or down by chance, right on average (Gupta et al. 2015, arXiv 1502.02551, section 3.1)."""

    def place(self, ratio: Tensor, cell: Tensor | float) -> Tensor:
        """Moved by up to half a cell: the nearer level is the likelier to be the nearest then."""
        return ratio + (torch.rand_like(ratio) - 0.5) * cell


class _Elementwise(ABC):
    """Multiplies every entry of a gradient by a factor of its own."""

    coordinate: ClassVar[Coordinate] = "residual"

    def slope(self, codes: int, samples: int, progress: float) -> Tensor | None:  # noqa: ARG002
        """None: a factor may depend on the gradient too."""
        return None

    @abstractmethod
    def factor(self, gradient: Tensor, residual: Tensor, progress: float) -> Tensor:
        """Of the shape of both."""

    @torch.no_grad()
    def correct(
        self,
        gradient: Tensor,
        xi: Tensor,
        kernel: int = 1,  # noqa: ARG002
        mask: Tensor | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """See `Estimator.correct`."""
        corrected = gradient * self.factor(gradient, xi, progress)
        return corrected if mask is None else corrected.where(mask, gradient)


@dataclass(frozen=True)
class ElementwiseScaling(_Elementwise):
    """EWGS: steps grow that lead back to the level (Lee, Kim, Ham 2021, arXiv 2104.00903, eq. 4).

    Attributes:
        delta: strength. The error x - Q(x) counts in steps; the paper counts it in ranges.
    """

    delta: float = 0.2

    def __post_init__(self) -> None:
        """Raise ValueError for a strength that could turn gradients around."""
        if not 0 <= self.delta <= 2:
            raise ValueError(f"delta is {self.delta!r}; give a number from 0 to 2.")

    def factor(self, gradient: Tensor, residual: Tensor, progress: float) -> Tensor:  # noqa: ARG002
        """1 + delta sign(G) (x - Q(x))."""
        return 1 + self.delta * gradient.sign() * residual / 2


@dataclass(frozen=True)
class SoftQuantization(_Elementwise):
    """DSQ: the slope of a staircase of tanh (Gong et al. 2019, arXiv 1908.05033, eq. 4 to 8).

    Attributes:
        alpha: its distance from the true staircase: near 0 all slope is at the thresholds.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        """Raise ValueError for an alpha no staircase has."""
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha!r}; give a number between 0 and 1.")

    def factor(self, gradient: Tensor, residual: Tensor, progress: float) -> Tensor:  # noqa: ARG002
        """Largest at the thresholds, 1 in the mean over a cell."""
        k = math.log(2 / self.alpha - 1)
        from_threshold = (1 - residual.abs()) / 2  # in steps
        slope: Tensor = 1 - torch.tanh(k * from_threshold).square()
        return slope * (k / (2 * math.tanh(k / 2)))


@dataclass(frozen=True)
class ErrorDecay(_Elementwise):
    """EDE: from a line's slope to that of a sign (Qin et al. 2020, arXiv 1909.10788, eq. 8).

    With more than two levels a value counts from its nearest threshold, in half steps.
    """

    def factor(self, gradient: Tensor, residual: Tensor, progress: float) -> Tensor:  # noqa: ARG002
        """k t (1 - tanh^2(t x)) with t from 0.1 to 10 and k = max(1 / t, 1)."""
        t = 0.1 * 100**progress
        slope = 1 - torch.tanh(t * (1 - residual.abs())).square()
        scaled: Tensor = max(1.0, t) * slope
        return scaled


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
