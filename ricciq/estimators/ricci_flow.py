"""Gradients corrected by the flow of an LNE metric: rows cut into blocks, each with its geometry.

`ricciq.estimators.ricci` has the mathematics; here are its settings, and what they do to a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ricciq.estimators.catalog import FlowSettings
from ricciq.estimators.ricci import (
    Metric,
    divergence,
    flow_euler,
    flow_linear,
    lne_metric,
    natural,
    normalized,
    parallel,
    project,
    pullback,
    scalar_curvature,
    staircase_slope,
    tau,
)

STAGES = 64
"""How many values a slope takes on while the flow time changes."""
SHARPEST = 0.02
"""The least flow time of a staircase: at 0 its slope is zero or infinite."""
SPREAD = (0.25, 4.0)
"""How far the schedule "measured" may take the flow time from its nominal value, as factors."""
CACHED = 2**16
"""Weights a CPU corrects at a time: so many stay in its cache, and it takes a third of the time."""


class Geometry(NamedTuple):
    """What a correction looked like: means over rows, the blocks of a row taken together."""

    perturbation_start: float  # norm of the off-diagonal part of g(0)
    perturbation_end: float  # the same of the normalized g(t)
    decay: float  # their ratio; 1 where there is nothing to decay
    scalar_curvature: float  # of g(0)
    divergence: float  # D[0 : xi], the distance to the discrete point
    mismatch_cosine: float  # between the gradient and the corrected one, all rows at once; of the
    # layer's inputs instead of its weights, where only gradients of activations are corrected
    residual_cosine: float  # between xi and the gradient; a row of zeros counts as 0


@dataclass(frozen=True)
class RicciFlow(FlowSettings):
    """Correct gradients by the flow of an LNE metric, after the paper.

    Its settings, with types, bounds and defaults, are `FlowSettings`.

    Example:
        >>> residual, gradient = torch.rand(8, 36) - 0.5, torch.randn(8, 36)
        >>> RicciFlow(time=0.05).correct(gradient, residual).shape
        torch.Size([8, 36])
    """

    def __post_init__(self) -> None:
        """Raise ValueError for a setting that is out of bounds or that a staircase has not."""
        super().__post_init__()
        if self.correction == "staircase":
            for name, value, only in [
                ("flow", self.flow, self.flow == "linear"),
                ("coordinate", self.coordinate, self.coordinate == "residual"),
                ("schedule", self.schedule, self.schedule != "measured"),
            ]:
                if not only:
                    raise ValueError(
                        f"{name} is {value!r}, which a staircase has not; give another correction."
                    )

    @torch.no_grad()
    def correct(
        self,
        gradient: Tensor,
        xi: Tensor,
        kernel: int = 1,
        mask: Tensor | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Correct a gradient taken at the discrete weights.

        Args:
            gradient: (rows, n), a row per output channel.
            xi: coordinate, (rows, n), 0 where the gradient is masked.
            kernel: the block size that "kernel" stands for.
            mask: bool, (rows, n), True where the gradient is active; elsewhere it takes no part and
                is returned as it is.
            progress: share of the training that is done, from 0 to 1, for the schedule.

        Returns:
            (rows, n) in the gradient's dtype, computed in float32, or float64 if either input is.
            A row whose xi is 0 throughout is returned as it is.

        Raises:
            ValueError: shapes differ or are not (rows, n), or kernel is not positive.
        """
        g, x = _alike(gradient, xi)
        if mask is not None:
            g, x = g.where(mask, 0), x.where(mask, 0)
        rows = len(g) if g.is_cuda else max(1, CACHED // max(1, g.shape[1]))
        pieces = zip(torch.split(g, rows), torch.split(x, rows), strict=True)
        corrected = torch.cat([self._correct_rows(*piece, kernel, progress) for piece in pieces])
        corrected = corrected.to(gradient.dtype)
        return corrected if mask is None else corrected.where(mask, gradient)

    def _correct_rows(self, gradient: Tensor, xi: Tensor, kernel: int, progress: float) -> Tensor:
        if self.correction == "staircase":
            return gradient * _staircase(xi, self._time(progress))
        flowed = self.metrics(xi, kernel, progress)
        parts = zip(self._cut(gradient, kernel), self._cut(xi, kernel), flowed, strict=True)
        corrected = torch.cat([self._rule(*part).flatten(1) for part in parts], dim=1)
        return corrected.where(xi.any(dim=1, keepdim=True), gradient)

    def metrics(
        self, xi: Tensor, kernel: int = 1, progress: float = 0.0
    ) -> list[tuple[Metric, Metric]]:
        """Metrics g(0) and normalized g(t) of each piece of a cut, one object if nothing flows."""
        pieces = [(x, tau(x, self.rho, self.tau_max)) for x in self._cut(xi, kernel)]
        starts = ends = [lne_metric(*piece) for piece in pieces]
        time, pace = self._time(progress), None
        if self.schedule == "measured":
            # Residuals spread evenly over their cells have the mean square 1/3: the time as it is.
            spread = 3 * xi.square().mean(dim=1)[:, None, None]
            shortest, longest = SPREAD
            time, pace = time * shortest, spread.clamp(shortest, longest) / shortest
        if time > 0 and self.flow != "none" and self.correction in ("natural", "pullback"):
            if self.flow == "euler":
                times = time if pace is None else time * pace
                ends = [flow_euler(*piece, times) for piece in pieces]
            else:
                # A residual needs the circle [-1, 1], a weight one that reaches around its row.
                half = xi.abs().amax(dim=1).clamp(min=1)[:, None, None]
                ends = [flow_linear(*piece, time, half, pace) for piece in pieces]
            ends = normalized(ends, starts)
        return list(zip(starts, ends, strict=True))

    def slope(self, codes: int, samples: int, progress: float) -> Tensor | None:
        """The factor on a gradient where it depends on nothing but a number's place on its grid.

        So it is with "staircase", and with blocks of one residual, where every cell has a metric of
        its own: with no row whose determinant could be kept, the factor's mean over the cell is 1.

        Args:
            codes: how many the grid has.
            samples: how many values to give a step.
            progress: share of the training that is done, from 0 to 1, for the schedule.

        Returns:
            Its values from one step below the lowest code to one above the highest, where it is cut
            off to 0, float32; None for a staircase with more than `max_codes`, for other blocks,
            for the coordinate "weight", for the schedule "measured", which depends on a row, and
            for "project", the same all over a cell.
        """
        if self.correction == "staircase":
            depends = codes <= self.max_codes
        else:
            depends = self.block == 1 and self.coordinate == "residual"
            depends &= self.correction != "project" and self.schedule != "measured"
        if not depends:
            return None
        time = self._time(round(progress * STAGES) / STAGES)
        return _tabulated(replace(self, schedule="constant", time=time), codes, samples)

    def _factor(self, r: Tensor) -> Tensor:
        """By which a gradient of 1 at each residual of (cells,) is multiplied, 1 on average."""
        x = r.view(-1, 1, 1)
        bound = math.atanh(math.sqrt(self.rho))  # sigma <= rho for it, as |r| is at most 1
        t = x.new_full((1, 1, 1), min(self.tau_max, bound))
        start = end = lne_metric(x, t)
        if self.flow == "linear":
            end = flow_linear(x, t, self.time)
        elif self.flow == "euler":
            end = flow_euler(x, t, self.time)
        factor = self._rule(torch.ones_like(x), x, (start, end)).flatten()
        return factor * (r[-1] - r[0]) / torch.trapezoid(factor, r)

    def _time(self, progress: float) -> float:
        if self.schedule == "linear":
            return self.time * (1 - progress)
        if self.schedule == "growing":
            return self.time * progress
        if self.schedule == "cosine":
            return self.time * (1 + math.cos(math.pi * progress)) / 2
        return self.time

    @torch.no_grad()
    def decay(self, xi: Tensor, times: Sequence[float], kernel: int = 1) -> list[float]:
        """The perturbation that the linear flow leaves after each time: a line on a log axis.

        Args:
            xi: coordinate, (rows, n).
            times: from 0.
            kernel: the block size that "kernel" stands for.

        Returns:
            For each time the norm of g(t) off its diagonal, not normalized: the blocks of a row
            taken together, the mean over rows.
        """
        x = _alike(xi)[0]
        half = x.abs().amax(dim=1).clamp(min=1)[:, None, None]
        norms = []
        for time in times:
            forms = [
                flow_linear(part, tau(part, self.rho, self.tau_max), time, half)
                for part in self._cut(x, kernel)
            ]
            squares = sum(form.off_diagonal_norm().square().sum(dim=1) for form in forms)
            norms.append(float(torch.as_tensor(squares).sqrt().mean()))
        return norms

    @torch.no_grad()
    def measure(
        self,
        gradient: Tensor,
        xi: Tensor,
        corrected: Tensor,
        kernel: int = 1,
        progress: float = 0.0,
    ) -> Geometry:
        """Describe what `correct` was given and what it returned; it raises the same errors."""
        g, x, c = _alike(gradient, xi, corrected)
        sums = x.new_zeros(4)
        flowed = self.metrics(x, kernel, progress)
        for part, forms in zip(self._cut(x, kernel), flowed, strict=True):
            t = tau(part, self.rho, self.tau_max)
            values = [form.off_diagonal_norm().square() for form in forms]
            values += [scalar_curvature(part, t), divergence(torch.zeros_like(part), part, t)]
            sums = sums + torch.stack(values, dim=-1).sum(dim=1)
        first, last = sums[:, :2].sqrt().mean(dim=0).tolist()
        curvature, distance = sums[:, 2:].mean(dim=0).tolist()
        # The tiny floor is for gradients that are small without being zero.
        along = torch.cosine_similarity(x, g, dim=1, eps=1e-30).mean().item()
        mismatch = torch.cosine_similarity(g.flatten(), c.flatten(), dim=0, eps=1e-30).item()
        decay = last / first if first > 0 else 1.0
        return Geometry(first, last, decay, curvature, distance, mismatch, along)

    def _rule(self, gradient: Tensor, xi: Tensor, flowed: tuple[Metric, Metric]) -> Tensor:
        start, end = flowed
        if self.correction == "project":
            return project(xi, gradient, self.strength)
        if self.correction == "parallel":
            return parallel(start, gradient)
        if self.correction == "natural":
            return natural(end, gradient)
        # g^-1 g is the identity: without a flow this is the straight-through estimator, exactly.
        return gradient if end is start else pullback(end, start, gradient)

    def _cut(self, x: Tensor, kernel: int) -> list[Tensor]:
        """Full blocks, (rows, blocks, size), and the shorter last ones, (rows, 1, rest), if any."""
        if kernel < 1:
            raise ValueError(f"kernel is {kernel}; give an integer from 1.")
        n = x.shape[1]
        size = n if self.block == "row" else kernel if self.block == "kernel" else self.block
        rest = n % min(size, n)
        full = x[:, : n - rest].reshape(len(x), -1, min(size, n))
        return [full, x[:, n - rest :].unsqueeze(1)] if rest else [full]


@lru_cache(maxsize=4 * STAGES)
def _tabulated(flow: RicciFlow, codes: int, samples: int) -> Tensor:
    """See `RicciFlow.slope`."""
    place = torch.arange(-samples, codes * samples + 1, dtype=torch.float64) / samples
    if flow.correction == "staircase":
        thresholds = 2.0 * torch.arange(codes - 1) + 1
        table = staircase_slope(2 * place, thresholds, max(flow.time, SHARPEST))
    else:
        r = torch.linspace(-1, 1, samples + 1, dtype=torch.float64)
        index = ((place - place.round()) * samples).round().long() + samples // 2
        table = flow._factor(r)[index] * ((place >= 0) & (place <= codes - 1))
    table[[0, -1]] = 0
    return table.float()


def _staircase(r: Tensor, time: float) -> Tensor:
    """Slope of an endless staircase at residuals."""
    time = max(time, SHARPEST)
    if time > 2:  # it is 1, to rounding error
        return torch.ones_like(r)
    reach = 1 + 2 * math.ceil(3 * math.sqrt(2 * time))
    return staircase_slope(r, torch.arange(-reach, reach + 1, 2, device=r.device), time)


def _alike(*tensors: Tensor) -> list[Tensor]:
    shapes = [tuple(x.shape) for x in tensors]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"shapes are {shapes}; give tensors of one shape (rows, n).")
    wide = any(x.dtype == torch.float64 for x in tensors)
    return [x.to(torch.float64 if wide else torch.float32) for x in tensors]
