"""Against oscillation of weights between two codes: damping toward a level, freezing at it."""

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
"""Weight of an optimizer step in the moving averages of `Freezing`, as in the paper."""


@dataclass(frozen=True)
class Damping:
    """A penalty on the distance of weights from their levels, growing toward the end of training.

    Nagel et al. 2022 (arXiv 2203.11086, section 4.1) penalize strength * |w - Q(w)|^2 except for
    clipped weights; the strength grows from 0 along half a cosine. The geometric form (derived
    here) replaces the square by the LNE divergence D[0 : r] of the residual, with one weight in a
    block. Its units make both forms equal for small residuals; near a threshold it pulls half as
    much.

    Attributes:
        strength: the strength at the end of training; 0 turns damping off.
        form: "l2" for the square, "lne" for the divergence.
    """

    strength: float
    form: Form = "l2"

    @torch.no_grad()
    def __call__(self, weights: Iterable[DiscreteWeight], progress: float) -> None:
        """Add the penalty's gradient to that of every weight that has one.

        Call it after the correction, which is for the gradient of the loss only.

        Args:
            weights: in any order.
            progress: the part of training that is done, 0 to 1.
        """
        strength = self.strength * (1 - math.cos(math.pi * progress)) / 2
        if strength == 0:
            return
        for item in weights:
            if item.weight.grad is not None:
                item.weight.grad += strength * self.gradient(item)

    def gradient(self, item: DiscreteWeight) -> Tensor:
        """The penalty's gradient at strength 1, in the shape of the weight.

        For a layer that standardizes its weight, the gradient with respect to the standardized
        weight is used.
        """
        pull = 2 * item.quantizer.error(item.weight)
        if self.form == "lne":  # the derivative of D[0 : r] is r times the potential's Hessian
            residual, _ = item.quantizer.residual(item.weight)
            curvature = tau(residual.unsqueeze(-1)).squeeze(-1)
            pull = pull * (1 - torch.tanh(curvature * residual).square())
        return pull.view_as(item.weight)


class Freezing(nn.Module):
    """Fix weights that oscillate between two codes at the code that they have most of the time.

    Nagel et al. 2022 (arXiv 2203.11086, section 4.2, algorithm 1): a weight oscillates at an
    optimizer step where its code changes against the direction of its last change. Once the moving
    average of such steps exceeds a threshold, the weight is fixed at the level nearest to the
    moving average of its code. The threshold falls along half a cosine from 1, which no average
    exceeds.

    The buffers, a set for each weight, are the state to save for resuming.

    Args:
        weights: of a calibrated model, on its device.
        threshold: the threshold at the end of training, 0 to 1; None freezes nothing.

    Raises:
        RecipeError: a quantizer cannot fix weights at a level: see
            `ricciq.quant.weight.WeightQuantizer.why_not_frozen`.
    """

    def __init__(self, weights: Sequence[DiscreteWeight], threshold: float | None) -> None:
        super().__init__()
        self.threshold = 1.0 if threshold is None else threshold
        self.weights = () if threshold is None else tuple(weights)
        for index, (name, weight, quantizer) in enumerate(self.weights):
            if quantizer.why_not_frozen:
                raise RecipeError(
                    f"training.freezing = {threshold:g} cannot fix the weights of {name}, "
                    f"{quantizer.why_not_frozen}; take damping"
                )
            codes = quantizer.codes(weight)
            self.register_buffer(f"codes{index}", codes)
            self.register_buffer(f"direction{index}", torch.zeros_like(codes))
            self.register_buffer(f"mean{index}", codes.float())
            self.register_buffer(f"frequency{index}", torch.zeros_like(weight))
            self.register_buffer(f"frozen{index}", torch.zeros_like(codes, dtype=torch.bool))

    @torch.no_grad()
    def forward(self, progress: float) -> None:
        """Update the averages after an optimizer step, and set frozen weights to their level.

        Args:
            progress: the part of training that is done, 0 to 1.
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
