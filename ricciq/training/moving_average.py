"""The exponential moving average of a network's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """Averages parameters and buffers after each step; counts are copied.

    A tensor is averaged once in a step, whatever the number of its names: layers may share a
    quantizer.

    Attributes:
        module: the network with the averaged tensors, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the tensors of a model.

        Args:
            model: what is averaged; it is copied.
            decay: share of the average that stays in a step.
        """
        average = partial(_average, decay)
        super().__init__(model, multi_avg_fn=average, use_buffers=True)
        self.module.eval()
        self.restart(model)

    def restart(self, model: nn.Module) -> None:
        """Begin anew with the tensors of a model."""
        self.n_averaged.zero_()
        self.update_parameters(model)  # the first ones are copied


@torch.no_grad()
def _average(decay: float, means: Sequence[Tensor], values: Sequence[Tensor], _: Tensor) -> None:
    if means[0].is_floating_point():
        torch._foreach_lerp_(list(means), list(values), 1 - decay)
    else:
        torch._foreach_copy_(list(means), list(values))
