"""The straight-through estimator, and stochastic rounding, which shares its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ricciq.estimators.catalog import Coordinate


@dataclass(frozen=True)
class StraightThrough:
    """Leave the gradient unchanged (Bengio et al. 2013, arXiv 1308.3432)."""

    coordinate: ClassVar[Coordinate] = "residual"

    def slope(self, codes: int, samples: int, progress: float) -> Tensor | None:  # noqa: ARG002
        """None: a factor of 1 needs no table."""
        return None

    def correct(
        self,
        gradient: Tensor,
        xi: Tensor,  # noqa: ARG002
        kernel: int = 1,  # noqa: ARG002
        mask: Tensor | None = None,  # noqa: ARG002
        progress: float = 0.0,  # noqa: ARG002
    ) -> Tensor:
        """See `ricciq.estimators.base.Estimator.correct`."""
        return gradient


class StochasticRounding(StraightThrough):
    """Round up or down at random, unbiased (Gupta et al. 2015, arXiv 1502.02551, section 3.1)."""

    def perturb(self, ratio: Tensor, cell: Tensor | float) -> Tensor:
        """Add uniform noise of up to half a cell; the nearest level then follows at random.

        Args:
            ratio: values in scales, any shape.
            cell: distance between the levels around each value.
        """
        return ratio + (torch.rand_like(ratio) - 0.5) * cell
