"""The seam between the training loop and the estimators: gradients in, corrected gradients out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ricciq.estimators import Estimator, StraightThrough
from ricciq.flow import Geometry, RicciFlow
from ricciq.quantizer import ActivationQuantizer, WeightQuantizer

TOGETHER = 2**22
"""Weights after which a group is full: enough to keep a GPU busy, little beside the model."""


class DiscreteWeight(NamedTuple):
    """A weight under training and the quantizer it goes through."""

    name: str
    weight: Tensor
    quantizer: WeightQuantizer


@dataclass(frozen=True)
class Correction:
    """Applies an estimator to the gradients of discrete weights, in place.

    Attributes:
        estimator: what to apply.
    """

    estimator: Estimator

    @torch.no_grad()
    def __call__(self, weights: Iterable[DiscreteWeight], progress: float = 0.0) -> None:
        """Correct every weight that has a gradient; call after backward and before clipping.

        Rows of one length are corrected together, whatever layers they are of.

        Args:
            weights: in any order.
            progress: share of the training that is done, from 0 to 1.
        """
        if isinstance(self.estimator, StraightThrough):
            return
        for group in _alike(weights):
            gradient = torch.cat([_gradient(item) for item in group])
            places = [_coordinate(self.estimator, item.weight, item.quantizer) for item in group]
            xi, mask = (torch.cat(parts) for parts in zip(*places, strict=True))
            kernel = _kernel(group[0].weight)
            corrected = self.estimator.correct(gradient, xi, kernel, mask, progress)
            rows = [len(item.weight) for item in group]
            for item, part in zip(group, torch.split(corrected, rows), strict=True):
                item.weight.grad.copy_(part.view_as(item.weight))  # type: ignore[union-attr]

    @torch.no_grad()
    def measure(
        self, weights: Iterable[DiscreteWeight], progress: float = 0.0
    ) -> dict[str, Geometry]:
        """The geometry of each weight's gradient; call it where the correction would be."""
        flow = self._flow
        rows = {}
        for item in weights:
            if item.weight.grad is not None:
                xi, mask = _coordinate(flow, item.weight, item.quantizer)
                gradient, kernel = _gradient(item), _kernel(item.weight)
                corrected = self.estimator.correct(gradient, xi, kernel, mask, progress)
                rows[item.name] = flow.measure(gradient, xi, corrected, kernel, progress)
        return rows

    @torch.no_grad()
    def decay(
        self, weights: Iterable[DiscreteWeight], times: Sequence[float]
    ) -> dict[str, list[float]]:
        """What `RicciFlow.decay` gives for each weight as it stands, gradients or not."""
        flow = self._flow
        return {
            item.name: flow.decay(
                _coordinate(flow, item.weight, item.quantizer)[0], times, _kernel(item.weight)
            )
            for item in weights
        }

    @property
    def _flow(self) -> RicciFlow:
        """The estimator's own; estimators that have no metric are measured with the default one."""
        return self.estimator if isinstance(self.estimator, RicciFlow) else RicciFlow()


class ActivationCorrection:
    """Applies an estimator to the gradients that a model's activation quantizers hand back.

    A row is what one picture has at one quantizer, and a kernel is one activation.

    Attributes:
        progress: share of the training that is done, from 0 to 1; to be kept up to date.
    """

    def __init__(self, model: nn.Module, estimator: Estimator) -> None:
        """Hook into every activation quantizer of a converted model."""
        self.estimator = estimator
        self.progress = 0.0
        for module in model.modules():
            if isinstance(module, ActivationQuantizer):
                module.register_forward_pre_hook(self._watch)

    def _watch(self, quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        (x,) = inputs
        if not x.requires_grad:
            return None
        seen = x.view_as(x)  # x may have other readers, whose gradients are to stay as they are
        hook = partial(self._correct, x=x.detach(), quantizer=quantizer)
        seen.register_hook(hook)  # type: ignore[no-untyped-call]
        return (seen,)

    @torch.no_grad()
    def _correct(self, gradient: Tensor, x: Tensor, quantizer: nn.Module) -> Tensor:
        assert isinstance(quantizer, ActivationQuantizer)
        xi, mask = _coordinate(self.estimator, x, quantizer)
        rows = gradient.flatten(1)
        corrected = self.estimator.correct(rows, xi, mask=mask, progress=self.progress)
        return corrected.view_as(gradient)


def _alike(weights: Iterable[DiscreteWeight]) -> Iterator[list[DiscreteWeight]]:
    """Those with gradients, in groups of one row length, kernel and dtype, none of them large."""
    groups: dict[tuple[int, int, torch.dtype], list[DiscreteWeight]] = defaultdict(list)
    for item in weights:
        if item.weight.grad is not None:
            shape = item.weight[0].numel(), _kernel(item.weight), item.weight.grad.dtype
            if sum(other.weight.numel() for other in groups[shape]) > TOGETHER:
                yield groups.pop(shape)
            groups[shape].append(item)
    yield from groups.values()


def _coordinate(
    estimator: Estimator, x: Tensor, quantizer: WeightQuantizer | ActivationQuantizer
) -> tuple[Tensor, Tensor]:
    """What the estimator takes as xi, (rows, n), and where the gradient is active."""
    residual, mask = quantizer.residual(x)
    if estimator.coordinate == "residual":
        return residual, mask
    return quantizer.ratio(x).flatten(1) * mask, mask


def _gradient(item: DiscreteWeight) -> Tensor:
    assert item.weight.grad is not None
    return item.weight.grad.flatten(1)


def _kernel(weight: Tensor) -> int:
    """How many weights make a kernel: one input channel's, or one weight of a linear layer."""
    return weight[0, 0].numel()
