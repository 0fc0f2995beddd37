"""Projection of a gradient: the ablation beside the corrections by a metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ricciq.estimators.catalog import Block, Coordinate
from ricciq.estimators.ricci import project
from ricciq.estimators.rowwise import Rowwise, cut_into_blocks


@dataclass(frozen=True)
class Projection(Rowwise):
    """Remove a share of the gradient's component along xi, as the flow does in long rows.

    A row whose xi is 0 throughout is returned unchanged.

    Attributes:
        coordinate: what xi is.
        block: the weights that share a direction.
        strength: the share that is removed.
    """

    coordinate: Coordinate = "residual"
    block: Block = "row"
    strength: float = 0.9

    def slope(self, codes: int, samples: int, progress: float) -> Tensor | None:  # noqa: ARG002
        """None: the direction depends on the whole block."""
        return None

    def correct_rows(self, gradient: Tensor, xi: Tensor, kernel: int, progress: float) -> Tensor:  # noqa: ARG002
        """See `Rowwise.correct_rows`."""
        blocks = zip(
            cut_into_blocks(xi, self.block, kernel),
            cut_into_blocks(gradient, self.block, kernel),
            strict=True,
        )
        parts = [project(x, g, self.strength).flatten(1) for x, g in blocks]
        return torch.cat(parts, dim=1).where(xi.any(dim=1, keepdim=True), gradient)
