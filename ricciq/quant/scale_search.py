"""The scale of each row of a weight with the least squared rounding error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ricciq.quant.fake_quantize import MIN_SCALE
from ricciq.quant.grid import Grid

EVALUATIONS = 11
"""Scales that a golden section search tries: the interval shrinks to 2 % of the first one."""
SHORT = 64
"""Weights of a row below which its error has too many minima for that, such as depthwise ones."""
AT_ONCE = 2**19
"""Weights that are searched at a time, so that they stay in a CPU's cache."""
_GOLDEN = (math.sqrt(5) - 1) / 2


def best_scales(rows: Tensor, grid: Grid, candidates: int) -> Tensor:
    """The scale with the least squared error found for each row.

    Of long rows, the error is nearly a smooth function of the scale, with one minimum, unless all
    weights lie on a lattice, or a few are far larger than the others. Golden section search finds
    it with a ninth of the candidates.

    Args:
        rows: (rows, n) weights.
        grid: of the codes.
        candidates: how many scales to try, evenly spaced up to the one that clips nothing; of rows
            with at least `SHORT` weights, no more than `EVALUATIONS`.

    Returns:
        (rows, 1), positive.
    """
    count = max(1, AT_ONCE // rows.shape[1])
    found = []
    for part in torch.split(rows, count):
        search = _Search(part, grid)
        if rows.shape[1] < SHORT or candidates <= EVALUATIONS:
            search.evenly(candidates)
        else:
            search.by_golden_section()
        found.append(search.scale)
    return torch.cat(found)


class _Search:
    """Scales that were tried for some rows.

    Attributes:
        scale: (rows, 1) the best so far.
    """

    def __init__(self, rows: Tensor, grid: Grid) -> None:
        self.rows, self.grid = rows, grid
        self.largest = rows.abs().amax(1, keepdim=True).clamp_min(MIN_SCALE)
        self.top = self.scale = self.largest / max(1, grid.high)
        self.least = torch.full_like(self.top, math.inf)
        self.ratio = torch.empty_like(rows)

    def distance(self, scale: Tensor) -> Tensor:
        """From the rows to their rounded form, (rows, 1); the scales are remembered if better."""
        torch.mul(self.rows, 1 / scale, out=self.ratio)
        error = self.grid.round(self.ratio).sub_(self.ratio)
        distance = self._norm(error).mul_(scale)
        self.scale = torch.where(distance < self.least, scale, self.scale)
        self.least = torch.minimum(distance, self.least)
        return distance

    def evenly(self, candidates: int) -> None:
        """Try evenly spaced scales."""
        for fraction in torch.linspace(1 / candidates, 1, candidates).tolist():
            self.distance(self.top * fraction)

    def by_golden_section(self) -> None:
        """Narrow an interval of the scales' logarithms (Kiefer 1953), all rows at once."""
        low, high = self._lowest(self.distance(self.top)).log(), self.top.log()
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        at_left, at_right = self.distance(left.exp()), self.distance(right.exp())
        for _ in range(EVALUATIONS - 3):
            down = at_left < at_right  # where what is right of `right` is left out
            low, high = torch.where(down, low, left), torch.where(down, right, high)
            new = torch.where(down, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
            at_new = self.distance(new.exp())
            at_kept, kept = torch.where(down, at_left, at_right), torch.where(down, left, right)
            left, right = torch.where(down, new, kept), torch.where(down, kept, new)
            at_left, at_right = (
                torch.where(down, at_new, at_kept),
                torch.where(down, at_kept, at_new),
            )

    def _lowest(self, known: Tensor) -> Tensor:
        """Smaller scales have larger distances than a known one, since they clip too much.

        Rounded rows reach as far as the last code lets them, and a distance is at least the
        difference of two lengths: that of the rows and that of their rounded form. The same holds
        for the largest weight alone.
        """
        reach = max(1, -self.grid.low, self.grid.high)
        by_all = (self._norm(self.rows) - known) / (reach * math.sqrt(self.rows.shape[1]))
        by_one = (self.largest - known) / reach
        return torch.maximum(torch.maximum(by_all, by_one), self.top / 100)

    @staticmethod
    def _norm(rows: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return norm
