"""Estimators that multiply each entry of a gradient by its own factor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ricciq.estimators.catalog import (
    Coordinate,
    ElementwiseScalingSettings,
    SoftQuantizationSettings,
)


class _Elementwise(ABC):
    """Multiplies each entry of a gradient by its own factor."""

    coordinate: ClassVar[Coordinate] = "residual"

    def slope(self, codes: int, samples: int, progress: float) -> Tensor | None:  # noqa: ARG002
        """None: a factor may also depend on the gradient."""
        return None

    @abstractmethod
    def factor(self, gradient: Tensor, residual: Tensor, progress: float) -> Tensor:
        """The factor of each entry.

        Args:
            gradient: (rows, n).
            residual: same shape, from -1 to 1.
            progress: share of training that is done, from 0 to 1.

        Returns:
            Same shape.
        """

    @torch.no_grad()
    def correct(
        self,
        gradient: Tensor,
        xi: Tensor,
        kernel: int = 1,  # noqa: ARG002
        mask: Tensor | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """See `ricciq.estimators.base.Estimator.correct`."""
        corrected = (gradient * self.factor(gradient, xi, progress)).to(gradient.dtype)
        return corrected if mask is None else corrected.where(mask, gradient)


@dataclass(frozen=True)
class ElementwiseScaling(ElementwiseScalingSettings, _Elementwise):
    """EWGS: gradients grow that lead back to the level (Lee et al. 2021, arXiv 2104.00903, eq. 4).

    The error x - Q(x) is in scales; the paper has it in ranges. A strength ``delta`` above 2 could
    reverse gradients.
    """

    def factor(self, gradient: Tensor, residual: Tensor, progress: float) -> Tensor:  # noqa: ARG002
        """1 + delta sign(G) (x - Q(x)); see `_Elementwise.factor`."""
        return 1 + self.delta * gradient.sign() * residual / 2


@dataclass(frozen=True)
class SoftQuantization(SoftQuantizationSettings, _Elementwise):
    """DSQ: the slope of a staircase of tanh (Gong et al. 2019, arXiv 1908.05033, eq. 4 to 8).

    ``alpha`` is its distance from the true staircase: near 0, all slope is at the thresholds.
    """

    def factor(self, gradient: Tensor, residual: Tensor, progress: float) -> Tensor:  # noqa: ARG002
        """Largest at the thresholds, with mean 1 over a cell; see `_Elementwise.factor`."""
        k = math.log(2 / self.alpha - 1)
        from_threshold = (1 - residual.abs()) / 2  # in scales
        slope: Tensor = 1 - torch.tanh(k * from_threshold).square()
        return slope * (k / (2 * math.tanh(k / 2)))


@dataclass(frozen=True)
class ErrorDecay(_Elementwise):
    """EDE: from the slope of a line to that of a sign (Qin et al. 2020, arXiv 1909.10788, eq. 8).

    With more than two levels, x is the distance from the nearest threshold, in half scales.
    """

    def factor(self, gradient: Tensor, residual: Tensor, progress: float) -> Tensor:  # noqa: ARG002
        """k t (1 - tanh^2(t x)), with t from 0.1 to 10 and k = max(1 / t, 1)."""
        t = 0.1 * 100**progress
        slope = 1 - torch.tanh(t * (1 - residual.abs())).square()
        scaled: Tensor = max(1.0, t) * slope
        return scaled
