"""What a gradient estimator is.

The straight-through estimator hands a gradient taken at discrete values to the continuous ones as
it is. Every other one changes it by where those values stand in their quantization cells.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from ricciq.estimators.catalog import Coordinate


class Estimator(Protocol):
    """Changes gradients; `ricciq.estimators.ricci_flow.RicciFlow` is one."""

    @property
    def coordinate(self) -> Coordinate:
        """What it takes as xi: the place in the quantization cell, or the value in steps."""

    def slope(self, codes: int, samples: int, progress: float) -> Tensor | None:
        """`ricciq.estimators.ricci_flow.RicciFlow.slope`; None where `correct` is to be used."""

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
class Perturbing(Protocol):
    """An estimator that changes the forward pass of training too."""

    def perturb(self, ratio: Tensor, cell: Tensor | float) -> Tensor:
        """What is rounded in the place of numbers, both counted in steps and of one shape.

        Args:
            ratio: any shape.
            cell: how far apart the levels are around each.
        """
