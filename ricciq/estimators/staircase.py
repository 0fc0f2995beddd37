"""The flow of single numbers: a staircase of levels, smoothed by a heat kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ricciq.estimators.catalog import Coordinate, Schedule
from ricciq.estimators.flow_time import STAGES, flow_time, stage
from ricciq.estimators.ricci import staircase_slope
from ricciq.estimators.rowwise import Rowwise

SHARPEST = 0.02
"""The shortest flow time of a staircase: at 0 its slope is zero or infinite."""


@dataclass(frozen=True)
class StaircaseFlow(Rowwise):
    """Multiply a gradient by the slope of x -> Q(x) after the linear flow.

    See `ricciq.estimators.ricci.staircase_slope`. It is what ``method: ricci`` does to activations.

    Attributes:
        time: flow time, from 0, in units of half a cell squared.
        schedule: how the time changes during training.
        max_codes: levels up to which activations are corrected; with more, the straight-through
            estimator's gradient remains.
    """

    time: float = 0.25
    schedule: Schedule = "constant"
    max_codes: int = 4

    coordinate: ClassVar[Coordinate] = "residual"

    def slope(self, codes: int, samples: int, progress: float) -> Tensor | None:
        """See `ricciq.estimators.base.Estimator.slope`; None for more than `max_codes`."""
        if codes > self.max_codes:
            return None
        return _tabulated(self._time(stage(progress) / STAGES), codes, samples)

    def correct_rows(self, gradient: Tensor, xi: Tensor, kernel: int, progress: float) -> Tensor:  # noqa: ARG002
        """See `Rowwise.correct_rows`; the staircase has no ends, and a row may be cut anywhere."""
        return gradient * _endless_slope(xi, self._time(progress))

    def _time(self, progress: float) -> float:
        return max(flow_time(self.time, self.schedule, progress), SHARPEST)


@lru_cache(maxsize=4 * STAGES)
def _tabulated(time: float, codes: int, samples: int) -> Tensor:
    """See `ricciq.estimators.base.Estimator.slope`."""
    position = torch.arange(-samples, codes * samples + 1, dtype=torch.float64) / samples
    thresholds = 2.0 * torch.arange(codes - 1) + 1
    table = staircase_slope(2 * position, thresholds, time)
    table[[0, -1]] = 0
    return table.float()


def _endless_slope(residual: Tensor, time: float) -> Tensor:
    """Slope, at residuals, of a staircase with thresholds on either side without end."""
    if time > 2:  # it is 1, to rounding error
        return torch.ones_like(residual)
    reach = 1 + 2 * math.ceil(3 * math.sqrt(2 * time))
    thresholds = torch.arange(-reach, reach + 1, 2, device=residual.device)
    return staircase_slope(residual, thresholds, time)
