"""The package's method by its settings: which estimator they make, and which bound on steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ricciq.estimators.apply import Correction
from ricciq.estimators.catalog import FlowSettings, Target
from ricciq.estimators.metric_flow import MetricFlow
from ricciq.estimators.projection import Projection
from ricciq.estimators.rowwise import Rowwise
from ricciq.estimators.staircase import StaircaseFlow
from ricciq.estimators.step_bound import StepBound


@dataclass(frozen=True)
class RicciFlow(FlowSettings, Rowwise):
    """Gradients corrected under Ricci flow, by the settings that ``method:`` of a recipe has.

    `correction` chooses the estimator: "staircase" is the flow of single numbers, "project" a plain
    projection, and each other one the flow of a metric of rows of weights. Settings that an
    estimator does not have are ignored.

    The settings, with types, bounds and defaults, are those of
    `ricciq.estimators.catalog.FlowSettings`.

    Raises:
        ValueError: a setting is out of bounds, or a staircase does not support it.

    Example:
        >>> residual, gradient = torch.rand(8, 36) - 0.5, torch.randn(8, 36)
        >>> RicciFlow(time=0.05).correct(gradient, residual).shape
        torch.Size([8, 36])
    """

    def __post_init__(self) -> None:
        """Validate every setting."""
        super().__post_init__()
        if self.correction == "staircase":
            for name, value, supported in [
                ("flow", self.flow, "linear"),
                ("coordinate", self.coordinate, "residual"),
            ]:
                if value != supported:
                    raise ValueError(
                        f"{name} is {value!r}, which the correction staircase does not support; "
                        f"give {supported}, or another correction."
                    )

    @property
    def estimator(self) -> StaircaseFlow | MetricFlow | Projection:
        """The estimator that the settings describe."""
        if self.correction == "staircase":
            return StaircaseFlow(self.time, self.schedule, self.max_codes)
        if self.correction == "project":
            return Projection(self.coordinate, self.block, self.strength)
        return MetricFlow(
            coordinate=self.coordinate,
            block=self.block,
            flow=self.flow,
            rule=self.correction,
            time=self.time,
            schedule=self.schedule,
            rho=self.rho,
            tau_max=self.tau_max,
        )

    def as_correction(self, target: Target | None = None) -> Correction:
        """What `finetune` does in training: correct with `estimator`, bound steps by `trust`.

        Args:
            target: whose gradients are corrected; by default those of activations for the
                correction "staircase", else those of weights.
        """
        usual: Target = "activations" if self.correction == "staircase" else "weights"
        return Correction(self.estimator, target or usual, StepBound(self.trust))

    def correct_rows(self, gradient: Tensor, xi: Tensor, kernel: int, progress: float) -> Tensor:
        """See `Rowwise.correct_rows`; it is that of `estimator`."""
        return self.estimator.correct_rows(gradient, xi, kernel, progress)
