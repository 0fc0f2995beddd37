"""The straight-through estimator, and stochastic rounding with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ricciq.estimators.catalog import Coordinate


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

    def perturb(self, ratio: Tensor, cell: Tensor | float) -> Tensor:
        """Moved by up to half a cell: the nearer level is the likelier to be the nearest then."""
        return ratio + (torch.rand_like(ratio) - 0.5) * cell
