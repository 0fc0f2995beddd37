"""Against weights that keep changing between two codes: damping to a level, freezing at it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ricciq.errors import RecipeError
from ricciq.estimators.apply import DiscreteWeight
from ricciq.estimators.ricci import tau

Form = Literal["l2", "lne"]
MOMENTUM = 0.01
"""Weight of a step in the moving averages of `Freezing`, as in the paper."""


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
        pull = 2 * item.quantizer.error(item.weight)
        if self.form == "lne":  # the derivative of D[0 : r] is r times the potential's Hessian
            residual, _ = item.quantizer.residual(item.weight)
            curvature = tau(residual.unsqueeze(-1)).squeeze(-1)
            pull = pull * (1 - torch.tanh(curvature * residual).square())
        return pull.view_as(item.weight)


class Freezing(nn.Module):
    """Fix weights that keep changing between two codes at the code they have most of the time.

    Nagel et al. 2022 (arXiv 2203.11086, section 4.2, algorithm 1): a weight oscillates at a step
    where its code changes against the direction of its last change. Once the share of such steps,
    a moving average, exceeds a threshold, the weight stays at the level next to the moving average
    of its code. The threshold falls along half a cosine from 1, which nothing exceeds.

    Its buffers, a set for each weight, are what has to be saved to go on.

    Args:
        weights: of a model on its device, calibrated.
        threshold: at the end of training, between 0 and 1; None freezes nothing.

    Raises:
        RecipeError: a layer standardizes its weight, so that its level is no value of its own, or
            has a codebook, whose levels move.
    """

    def __init__(self, weights: Sequence[DiscreteWeight], threshold: float | None) -> None:
        super().__init__()
        self.threshold = 1.0 if threshold is None else threshold
        self.weights = () if threshold is None else tuple(weights)
        for index, (name, weight, quantizer) in enumerate(self.weights):
            if not isinstance(quantizer.standardize, nn.Identity):
                raise RecipeError(
                    f"training.freezing = {threshold:g} cannot fix the weights of {name}, which "
                    "are standardized; take damping"
                )
            if quantizer.levels is not None:
                raise RecipeError(
                    f"training.freezing = {threshold:g} cannot fix the weights of {name}, whose "
                    "codebook moves; take damping"
                )
            codes = quantizer.codes(weight)
            self.register_buffer(f"codes{index}", codes)
            self.register_buffer(f"direction{index}", torch.zeros_like(codes))
            self.register_buffer(f"mean{index}", codes.float())
            self.register_buffer(f"frequency{index}", torch.zeros_like(weight))
            self.register_buffer(f"frozen{index}", torch.zeros_like(codes, dtype=torch.bool))

    @torch.no_grad()
    def forward(self, progress: float) -> None:
        """Count what the optimizer has just changed, and put frozen weights back to their level.

        Args:
            progress: share of the training that is done, from 0 to 1.
        """
        least = self.threshold + (1 - self.threshold) * (1 + math.cos(math.pi * progress)) / 2
        for index, (_, weight, quantizer) in enumerate(self.weights):
            before, direction, mean, frequency, frozen = (
                self.get_buffer(f"{name}{index}")
                for name in ("codes", "direction", "mean", "frequency", "frozen")
            )
            codes = quantizer.codes(weight)
            move = (codes.int() - before.int()).sign().to(torch.int8)
            back = (move * direction).eq(-1)
            before.copy_(codes)
            direction.copy_(torch.where(move.bool(), move, direction))
            frequency.lerp_(back.float(), MOMENTUM)
            mean.copy_(torch.where(frozen, mean, mean.lerp(codes.float(), MOMENTUM)))
            frozen |= frequency > least
            rows = quantizer.scale.view(-1, *[1] * (weight.dim() - 1))
            weight.copy_(torch.where(frozen, quantizer.grid.round(mean) * rows, weight))
