"""Against weights that keep changing between two codes: damping toward the level they are at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ricciq.correction import DiscreteWeight
from ricciq.ricci import tau

Form = Literal["l2", "lne"]


@dataclass(frozen=True)
class Damping:
    """A penalty on the distance of weights from their levels, growing toward the end of training.

    Nagel et al. 2022 (arXiv 2203.11086, section 4.1) penalize strength * |w - Q(w)|^2, clipped
    weights excepted; the strength grows from 0 along half a cosine. In its geometric form (derived
    here) the LNE divergence D[0 : r] of the residual takes the place of the square, every weight a
    block of its own, in units that make both forms one for small residuals: near a threshold it
    pulls half as much.

    Attributes:
        strength: at the end of training; 0 leaves the gradients as they are.
        form: which of the two.
    """

    strength: float
    form: Form = "l2"

    @torch.no_grad()
    def __call__(self, weights: Iterable[DiscreteWeight], progress: float) -> None:
        """Add the penalty's gradient to that of every weight that has one.

        Call it after the correction, which is about the gradient of the loss only.

        Args:
            weights: in any order.
            progress: share of the training that is done, from 0 to 1.
        """
        strength = self.strength * (1 - math.cos(math.pi * progress)) / 2
        if strength == 0:
            return
        for item in weights:
            if item.weight.grad is not None:
                item.weight.grad += strength * self.gradient(item)

    def gradient(self, item: DiscreteWeight) -> Tensor:
        """Of the penalty at strength 1, in the shape of the weight.

        A weight that its layer standardizes is pulled as if it were the standardized one.
        """
        residual, _ = item.quantizer.residual(item.weight)
        half_cell = item.quantizer.scale[:, None] * item.quantizer.grid.step / 2
        pull = 2 * half_cell * residual
        if self.form == "lne":  # the derivative of D[0 : r] is r times the potential's Hessian
            curvature = tau(residual.unsqueeze(-1)).squeeze(-1)
            pull = pull * (1 - torch.tanh(curvature * residual).square())
        return pull.view_as(item.weight)
