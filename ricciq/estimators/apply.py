"""Estimators at work in the training loop: gradients in, corrected gradients out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ricciq.estimators.base import Estimator, Perturbing
from ricciq.estimators.catalog import Target
from ricciq.estimators.cosine import Cosine
from ricciq.estimators.flow_time import stage
from ricciq.estimators.metric_flow import Geometry, MetricFlow
from ricciq.estimators.projection import Projection
from ricciq.estimators.staircase import StaircaseFlow
from ricciq.estimators.step_bound import StepBound
from ricciq.estimators.straight_through import StraightThrough
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.fake_quantize import SLOPE_SAMPLES
from ricciq.quant.weight import WeightQuantizer

GROUP_SIZE = 2**22
"""Weights that are corrected together: enough to keep a GPU busy, few beside the model."""


class DiscreteWeight(NamedTuple):
    """A weight under training and its quantizer.

    Attributes:
        name: of the layer.
        weight: as the optimizer sees it, (rows, ...).
        quantizer: what makes it discrete.
    """

    name: str
    weight: Tensor
    quantizer: WeightQuantizer


@dataclass(frozen=True)
class Correction:
    """What a method does in training; calling it corrects the gradients of weights in place.

    Attributes:
        estimator: corrects the gradients.
        target: whose gradients are corrected. For those of activations, see `Attachment`.
        step_bound: bounds the optimizer step.

    Raises:
        TypeError: the estimator is none; for a `RicciFlow`, use its ``as_correction``.
    """

    estimator: Estimator
    target: Target = "weights"
    step_bound: StepBound = field(default_factory=StepBound)

    def __post_init__(self) -> None:
        """Check the estimator."""
        if not isinstance(self.estimator, Estimator):
            kind = type(self.estimator).__name__
            raise TypeError(f"{kind} is no Estimator; for a RicciFlow, use its as_correction()")

    @torch.no_grad()
    def __call__(self, weights: Iterable[DiscreteWeight], progress: float = 0.0) -> None:
        """Correct the gradient of every weight that has one.

        Call it after the backward pass and before clipping. Rows of equal length are corrected
        together, whichever layers they belong to.

        Args:
            weights: in any order.
            progress: share of training that is done, from 0 to 1.
        """
        if self.target == "activations" or isinstance(self.estimator, StraightThrough):
            return
        for group in _grouped(weights):
            gradient = torch.cat([_gradient(item) for item in group])
            inputs = [_coordinate(self.estimator, item.weight, item.quantizer) for item in group]
            xi, mask = (torch.cat(parts) for parts in zip(*inputs, strict=True))
            kernel = _kernel(group[0].weight)
            corrected = self.estimator.correct(gradient, xi, kernel, mask, progress)
            rows = [len(item.weight) for item in group]
            for item, part in zip(group, torch.split(corrected, rows), strict=True):
                item.weight.grad.copy_(part.view_as(item.weight))  # type: ignore[union-attr]

    @torch.no_grad()
    def measure(
        self, weights: Iterable[DiscreteWeight], progress: float = 0.0
    ) -> dict[str, Geometry]:
        """Measure the geometry of each weight's gradient, and correct nothing.

        Call it where the correction would be called.

        Args:
            weights: in any order; those without a gradient are left out.
            progress: share of training that is done, from 0 to 1.

        Returns:
            The geometry of each weight, by name.
        """
        probe = self._probe
        rows = {}
        for item in weights:
            if item.weight.grad is not None:
                xi, mask = _coordinate(probe, item.weight, item.quantizer)
                gradient, kernel = _gradient(item), _kernel(item.weight)
                corrected = gradient
                if self.target != "activations":
                    corrected = self.estimator.correct(gradient, xi, kernel, mask, progress)
                rows[item.name] = probe.measure(gradient, xi, corrected, kernel, progress)
        return rows

    @torch.no_grad()
    def decay(
        self, weights: Iterable[DiscreteWeight], times: Sequence[float]
    ) -> dict[str, list[float]]:
        """`MetricFlow.decay` of each weight in its present state, by name; needs no gradients.

        Args:
            weights: in any order.
            times: flow times, from 0.
        """
        probe = self._probe
        return {
            item.name: probe.decay(
                _coordinate(probe, item.weight, item.quantizer)[0], times, _kernel(item.weight)
            )
            for item in weights
        }

    @property
    def applies_flow(self) -> bool:
        """Whether the flow that `measure` and `decay` describe changes gradients in training.

        If not, they are a probe: they show what the flow of rows of weights would do.
        """
        flow = self.estimator
        return (
            self.target != "activations"
            and isinstance(flow, MetricFlow)
            and flow.flows
            and flow.block != 1
        )

    @property
    def _probe(self) -> MetricFlow:
        """The flow whose geometry is measured; that of whole rows if none of several weights acts.

        A projection does not flow, and neither does its probe.
        """
        estimator = self.estimator
        if isinstance(estimator, MetricFlow) and estimator.block != 1:
            return estimator
        if isinstance(estimator, Projection) and estimator.block != 1:
            return MetricFlow(estimator.coordinate, estimator.block, flow="none")
        if isinstance(estimator, MetricFlow | StaircaseFlow):
            return MetricFlow(estimator.coordinate, time=estimator.time)
        return MetricFlow(estimator.coordinate)


def override_forward(model: nn.Module, correction: Correction) -> list[nn.Module]:
    """Let an estimator change what a converted model rounds in training, if it is `Perturbing`.

    Args:
        model: a converted model.
        correction: its target says which quantizers are changed.

    Returns:
        The quantizers that were given a `perturbation`.
    """
    estimator = correction.estimator
    if not isinstance(estimator, Perturbing):
        return []
    chosen = []
    for module in model.modules():
        weights = isinstance(module, WeightQuantizer) and correction.target != "activations"
        if weights or (isinstance(module, ActivationQuantizer) and correction.target != "weights"):
            setattr(module, "perturbation", estimator.perturb)  # noqa: B010  mypy takes it for a tensor
            chosen.append(module)
    return chosen


class Attachment:
    """Attaches an estimator to a converted model for the duration of training.

    Attributes:
        activations: corrects the gradients of activations, if they are a target.
    """

    def __init__(
        self, model: nn.Module, correction: Correction, average: nn.Module | None = None
    ) -> None:
        """Add hooks, slopes and changes of the forward pass to the quantizers.

        Args:
            model: the model whose gradients are corrected.
            correction: the estimator and its target.
            average: a copy of the model that only runs forward.
        """
        networks = [model] if average is None or average is model else [model, average]
        self._perturbed = [
            module for network in networks for module in override_forward(network, correction)
        ]
        self.activations: ActivationCorrection | None = None
        if correction.target != "weights":
            self.activations = ActivationCorrection(model, correction.estimator)

    def detach(self) -> None:
        """Restore the quantizers. Calling it again does nothing."""
        for module in self._perturbed:
            vars(module).pop("perturbation", None)  # the class has None
        if self.activations is not None:
            self.activations.detach()


class ActivationCorrection:
    """Corrects the gradients of a model's activations, at its activation quantizers.

    An estimator whose factor depends only on the residual becomes the slope of the quantizers with
    fewer than 8 bits, as part of their backward pass. Any other estimator is called in front of
    them, with a row for each image and one activation as the kernel.
    """

    def __init__(self, model: nn.Module, estimator: Estimator) -> None:
        """Attach to every activation quantizer.

        Args:
            model: a converted model.
            estimator: what corrects the gradients.
        """
        self.estimator = estimator
        self.quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
        self.progress = -1.0
        self.has_slope = estimator.slope(2, SLOPE_SAMPLES, 0.0) is not None
        self.advance(0.0)
        self._handles: list[RemovableHandle] = []
        if not self.has_slope:
            self._handles = [
                q.register_forward_pre_hook(self._before_forward) for q in self.quantizers
            ]

    def detach(self) -> None:
        """Remove hooks and slopes from the quantizers."""
        for handle in self._handles:
            handle.remove()
        for quantizer in self.quantizers:
            vars(quantizer).pop("slope", None)  # the class has None

    def advance(self, progress: float) -> None:
        """Set the share of training that is done, from 0 to 1; call it before each step."""
        same_stage = stage(progress) == stage(self.progress)
        self.progress = progress
        if same_stage:
            return
        self.set_slopes()

    def set_slopes(self) -> None:
        """Give every quantizer the slope for its width at this stage of training."""
        for quantizer in self.quantizers:
            slope = None
            if quantizer.bits < 8:
                slope = self.estimator.slope(2**quantizer.bits, SLOPE_SAMPLES, self.progress)
            quantizer.slope = None if slope is None else slope.to(quantizer.zero_point.device)

    @contextmanager
    def measuring(self) -> Iterator[dict[nn.Module, float]]:
        """Measure how far gradients are turned, during the forward and backward pass of the block.

        Yields:
            For each quantizer, once the backward pass is done, the cosine between the gradients of
            its inputs by the straight-through estimator and the corrected ones.
        """
        cosines: dict[nn.Module, float] = {}
        sums: dict[nn.Module, Cosine] = defaultdict(Cosine)  # over all layers that share it

        def observe(quantizer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                hook = partial(compare, quantizer=quantizer, x=inputs[0].detach())
                output.register_hook(hook)  # type: ignore[no-untyped-call]

        @torch.no_grad()
        def compare(gradient: Tensor, quantizer: nn.Module, x: Tensor) -> None:
            assert isinstance(quantizer, ActivationQuantizer)
            xi, mask = _coordinate(self.estimator, x, quantizer)
            plain = gradient.flatten(1).float() * mask
            if self.has_slope:
                part = (gradient * quantizer.slope_at(x)).flatten(1)
            else:
                part = self.estimator.correct(plain, xi, mask=mask, progress=self.progress)
            sums[quantizer].add(plain, part)
            cosines[quantizer] = sums[quantizer].value

        handles = [quantizer.register_forward_hook(observe) for quantizer in self.quantizers]
        try:
            yield cosines
        finally:
            for handle in handles:
                handle.remove()

    def _before_forward(
        self, quantizer: nn.Module, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        (x,) = inputs
        return (_WithCorrection.apply(x, self._correct, quantizer),) if x.requires_grad else None

    @torch.no_grad()
    def _correct(self, gradient: Tensor, x: Tensor, quantizer: nn.Module) -> Tensor:
        assert isinstance(quantizer, ActivationQuantizer)
        xi, mask = _coordinate(self.estimator, x, quantizer)
        rows = gradient.flatten(1)
        corrected = self.estimator.correct(rows, xi, mask=mask, progress=self.progress)
        return corrected.view_as(gradient)


class _WithCorrection(torch.autograd.Function):
    """A view whose gradient is corrected; other uses of the tensor keep their own gradients.

    torch 2.11 compiles a hook of a tensor to code that reads the tensor before it is computed.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, correct: Callable[[Tensor, Tensor, nn.Module], Tensor], q: nn.Module
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.correct, ctx.quantizer = correct, q
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.correct(grads[0], x, ctx.quantizer), None, None


def _grouped(weights: Iterable[DiscreteWeight]) -> Iterator[list[DiscreteWeight]]:
    """Weights with gradients, in groups of equal row length, kernel and dtype of limited size."""
    groups: dict[tuple[int, int, torch.dtype], list[DiscreteWeight]] = defaultdict(list)
    for item in weights:
        if item.weight.grad is not None:
            shape = item.weight[0].numel(), _kernel(item.weight), item.weight.grad.dtype
            if sum(other.weight.numel() for other in groups[shape]) > GROUP_SIZE:
                yield groups.pop(shape)
            groups[shape].append(item)
    yield from groups.values()


def _coordinate(
    estimator: Estimator, x: Tensor, quantizer: WeightQuantizer | ActivationQuantizer
) -> tuple[Tensor, Tensor]:
    """The estimator's xi, (rows, n), and the mask of where the gradient is active."""
    residual, mask = quantizer.residual(x)
    if estimator.coordinate == "residual":
        return residual, mask
    return quantizer.ratio(x).flatten(1) * mask, mask


def _gradient(item: DiscreteWeight) -> Tensor:
    assert item.weight.grad is not None
    return item.weight.grad.flatten(1)


def _kernel(weight: Tensor) -> int:
    """Weights in a kernel: those of one input channel, or one weight of a linear layer."""
    return weight[0, 0].numel()
