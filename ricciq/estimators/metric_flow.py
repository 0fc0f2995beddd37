"""The flow of an LNE metric: rows of weights cut into blocks, each with a geometry.

`ricciq.estimators.ricci` has the mathematics; this module applies it to weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ricciq.estimators.catalog import Block, Coordinate, Flow, MetricRule, Schedule
from ricciq.estimators.cosine import Cosine
from ricciq.estimators.flow_time import STAGES, flow_time, stage
from ricciq.estimators.ricci import (
    Metric,
    divergence,
    flow_euler,
    flow_linear,
    lne_metric,
    natural,
    normalized,
    parallel,
    pullback,
    scalar_curvature,
    tau,
)
from ricciq.estimators.rowwise import Rowwise, as_rows, cut_into_blocks


class Geometry(NamedTuple):
    """What a correction looked like: means over rows, the blocks of a row taken together.

    Attributes:
        perturbation_start: norm of the off-diagonal part of g(0).
        perturbation_end: norm of the off-diagonal part of the normalized g(t).
        decay: their ratio; 1 where there is nothing to decay.
        scalar_curvature: of g(0).
        divergence: D[0 : xi], the distance to the discrete point.
        mismatch_cosine: cosine between the gradient and the corrected one, over all rows; of the
            layer's inputs, not its weights, where only gradients of activations are corrected.
        residual_cosine: cosine between xi and the gradient; a row of zeros counts as 0.
    """

    perturbation_start: float
    perturbation_end: float
    decay: float
    scalar_curvature: float
    divergence: float
    mismatch_cosine: float
    residual_cosine: float


@dataclass(frozen=True)
class MetricFlow(Rowwise):
    """Correct gradients of weights by the flow of an LNE metric, after the paper.

    A row whose xi is 0 throughout is returned unchanged.

    Attributes:
        coordinate: what xi is.
        block: the weights that share a metric.
        flow: how the metric flows: in closed form, by one Euler step, or not at all.
        rule: what the metrics do to a gradient; parallel uses no flow.
        time: flow time, from 0.
        schedule: how the time changes during training.
        rho: bound on sigma, above 0 and below 1.
        tau_max: bound on the curvature tau.
    """

    coordinate: Coordinate = "residual"
    block: Block = "row"
    flow: Flow = "linear"
    rule: MetricRule = "pullback"
    time: float = 0.1
    schedule: Schedule = "constant"
    rho: float = 0.9
    tau_max: float = 1.0

    @property
    def flows(self) -> bool:
        """Whether the flow changes what is done to a gradient."""
        return self.rule != "parallel" and self.flow != "none" and self.time > 0

    def metrics(
        self, xi: Tensor, kernel: int = 1, progress: float = 0.0
    ) -> list[tuple[Metric, Metric]]:
        """The metrics before and after the flow.

        Args:
            xi: coordinate, (rows, n).
            kernel: the block size that "kernel" means.
            progress: share of training that is done, from 0 to 1.

        Returns:
            g(0) and the normalized g(t) for each part of `cut_into_blocks`; the same object twice
            if nothing flows.

        Raises:
            ValueError: kernel is not positive.
        """
        parts = [(x, self._tau(x)) for x in cut_into_blocks(xi, self.block, kernel)]
        starts = ends = [lne_metric(*part) for part in parts]
        time = flow_time(self.time, self.schedule, progress)
        if self.flows and time > 0:
            if self.flow == "euler":
                ends = [flow_euler(*part, time) for part in parts]
            else:
                half = _half_circle(xi)
                ends = [flow_linear(*part, time, half) for part in parts]
            ends = normalized(ends, starts)
        return list(zip(starts, ends, strict=True))

    def correct_rows(self, gradient: Tensor, xi: Tensor, kernel: int, progress: float) -> Tensor:
        """See `Rowwise.correct_rows`."""
        parts = zip(
            cut_into_blocks(gradient, self.block, kernel),
            self.metrics(xi, kernel, progress),
            strict=True,
        )
        corrected = torch.cat([self._apply(*part).flatten(1) for part in parts], dim=1)
        return corrected.where(xi.any(dim=1, keepdim=True), gradient)

    def slope(self, codes: int, samples: int, progress: float) -> Tensor | None:
        """See `ricciq.estimators.base.Estimator.slope`.

        With blocks of one residual every cell has a metric that depends on nothing else. There is
        no row whose determinant could be kept, so the factor has the mean 1 over the cell.

        Args:
            codes: levels of the quantizer.
            samples: values per scale.
            progress: share of training that is done, from 0 to 1.

        Returns:
            The tabulated factor; None for larger blocks and for the coordinate "weight".
        """
        if self.block != 1 or self.coordinate != "residual":
            return None
        time = flow_time(self.time, self.schedule, stage(progress) / STAGES)
        return _tabulated(replace(self, time=time, schedule="constant"), codes, samples)

    def cell_factor(self, residual: Tensor) -> Tensor:
        """The factor on a gradient at each residual of a cell that is a block by itself.

        Args:
            residual: (samples,), evenly spaced from -1 to 1.

        Returns:
            Same shape, with the mean 1.
        """
        x = residual.view(-1, 1, 1)
        bound = math.atanh(math.sqrt(self.rho))  # sigma <= rho below it, as |residual| <= 1
        t = x.new_full((1, 1, 1), min(self.tau_max, bound))
        start = end = lne_metric(x, t)
        if self.flow == "linear":
            end = flow_linear(x, t, self.time)
        elif self.flow == "euler":
            end = flow_euler(x, t, self.time)
        factor = self._apply(torch.ones_like(x), (start, end)).flatten()
        return factor * (residual[-1] - residual[0]) / torch.trapezoid(factor, residual)

    @torch.no_grad()
    def decay(self, xi: Tensor, times: Sequence[float], kernel: int = 1) -> list[float]:
        """The perturbation that the linear flow leaves after each time: a line on a log axis.

        Args:
            xi: coordinate, (rows, n).
            times: flow times, from 0.
            kernel: the block size that "kernel" means.

        Returns:
            For each time the norm of the off-diagonal part of g(t), not normalized: the blocks of a
            row taken together, the mean over rows.

        Raises:
            ValueError: xi is not (rows, n), or kernel is not positive.
        """
        (x,) = as_rows(xi)
        half = _half_circle(x)
        parts = [(part, self._tau(part)) for part in cut_into_blocks(x, self.block, kernel)]
        norms = []
        for time in times:
            forms = [flow_linear(*part, time, half) for part in parts]
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
        """Measure the geometry of a correction.

        Args:
            gradient: what was corrected, (rows, n).
            xi: coordinate, same shape.
            corrected: what became of the gradient, same shape.
            kernel: the block size that "kernel" means.
            progress: share of training that is done, from 0 to 1.

        Raises:
            ValueError: shapes differ or are not (rows, n), or kernel is not positive.
        """
        g, x, c = as_rows(gradient, xi, corrected)
        sums = x.new_zeros(4)
        parts = cut_into_blocks(x, self.block, kernel)
        for part, forms in zip(parts, self.metrics(x, kernel, progress), strict=True):
            t = self._tau(part)
            values = [form.off_diagonal_norm().square() for form in forms]
            values += [scalar_curvature(part, t), divergence(torch.zeros_like(part), part, t)]
            sums = sums + torch.stack(values, dim=-1).sum(dim=1)
        first, last = sums[:, :2].sqrt().mean(dim=0).tolist()
        curvature, distance = sums[:, 2:].mean(dim=0).tolist()
        # The tiny floor is for gradients that are small without being zero.
        along = torch.cosine_similarity(x, g, dim=1, eps=1e-30).mean().item()
        mismatch = Cosine()
        mismatch.add(g, c)
        decay = last / first if first > 0 else 1.0
        return Geometry(first, last, decay, curvature, distance, mismatch.value, along)

    def _tau(self, xi: Tensor) -> Tensor:
        return tau(xi, self.rho, self.tau_max)

    def _apply(self, gradient: Tensor, metrics: tuple[Metric, Metric]) -> Tensor:
        start, end = metrics
        if self.rule == "parallel":
            return parallel(start, gradient)
        if self.rule == "natural":
            return natural(end, gradient)
        # g^-1 g is the identity: without a flow this is the straight-through estimator, exactly.
        return gradient if end is start else pullback(end, start, gradient)


def _half_circle(xi: Tensor) -> Tensor:
    """Half the circle that a row's coordinates live on, (rows, 1, 1).

    A residual needs the circle [-1, 1], a weight one that contains its row.
    """
    return xi.abs().amax(dim=1).clamp(min=1)[:, None, None]


@lru_cache(maxsize=4 * STAGES)
def _tabulated(flow: MetricFlow, codes: int, samples: int) -> Tensor:
    """See `MetricFlow.slope`."""
    position = torch.arange(-samples, codes * samples + 1, dtype=torch.float64) / samples
    residual = torch.linspace(-1, 1, samples + 1, dtype=torch.float64)
    index = ((position - position.round()) * samples).round().long() + samples // 2
    table = flow.cell_factor(residual)[index] * ((position >= 0) & (position <= codes - 1))
    table[[0, -1]] = 0
    return table.float()
