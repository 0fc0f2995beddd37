"""What a gradient estimator is.

The straight-through estimator passes a gradient taken at discrete values on to the continuous
values unchanged. Every other estimator changes it, depending on where those values lie in their
quantization cells.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from ricciq.estimators.catalog import Coordinate


@runtime_checkable
class Estimator(Protocol):
    """Corrects gradients; `ricciq.estimators.metric_flow.MetricFlow` is an example."""

    @property
    def coordinate(self) -> Coordinate:
        """What xi is: the residual in the quantization cell, or the value in scales."""

    def slope(self, codes: int, samples: int, progress: float) -> Tensor | None:
        """The factor on a gradient, if it depends only on a number's position on its grid.

        Args:
            codes: levels of the quantizer.
            samples: values per scale.
            progress: share of training that is done, from 0 to 1.

        Returns:
            The factor from one scale below the lowest code to one above the highest, 0 at both
            ends, float32, ((codes + 1) * samples + 1,). None if `correct` is to be used, or if the
            gradient of such a quantizer is not corrected.
        """

    def correct(
        self,
        gradient: Tensor,
        xi: Tensor,
        kernel: int = 1,
        mask: Tensor | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Turn a gradient taken at discrete values into that of the continuous values.

        Args:
            gradient: (rows, n).
            xi: (rows, n), 0 where the gradient is masked; a residual is 0 at a level and 1 or -1 at
                the threshold above or below it.
            kernel: how many neighbours in a row make a kernel.
            mask: bool, (rows, n), True where the gradient is active; other entries are returned
                unchanged, which are 0 unless the layer standardizes its weight.
            progress: share of training that is done, from 0 to 1.

        Returns:
            (rows, n), in the gradient's dtype.
        """


@runtime_checkable
class Perturbing(Protocol):
    """An estimator that also changes the forward pass of training."""

    def perturb(self, ratio: Tensor, cell: Tensor | float) -> Tensor:
        """The values to round instead of the given ones.

        Args:
            ratio: values in scales, any shape.
            cell: distance between the levels around each value.

        Returns:
            Same shape, in scales.
        """
