"""The seam between the training loop and the estimators: gradients in, corrected gradients out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ricciq.estimators.base import Estimator, Perturbing
from ricciq.estimators.ricci_flow import STAGES, Geometry, RicciFlow
from ricciq.estimators.straight_through import StraightThrough
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.fake_quantize import SLOPE_SAMPLES
from ricciq.quant.weight import WeightQuantizer

Target = Literal["weights", "activations", "both"]
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
        on: whose gradients it corrects; those of activations are `ActivationCorrection`'s.
    """

    estimator: Estimator
    on: Target = "weights"

    @torch.no_grad()
    def __call__(self, weights: Iterable[DiscreteWeight], progress: float = 0.0) -> None:
        """Correct every weight that has a gradient; call after backward and before clipping.

        Rows of one length are corrected together, whatever layers they are of.

        Args:
            weights: in any order.
            progress: share of the training that is done, from 0 to 1.
        """
        if self.on == "activations" or isinstance(self.estimator, StraightThrough):
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

    @contextmanager
    def within_trust(self, weights: Iterable[DiscreteWeight]) -> Iterator[None]:
        """Around the optimizer's step: no weight goes farther than `RicciFlow.trust` in it.

        A gradient at the discrete weights speaks for their cells; a step across several of them, as
        a high learning rate takes, has nothing to go by (derived here). A layer with 8 bits, where
        a cell is next to nothing, may go anywhere, and so may one that standardizes its weight, as
        what it stores has no cells.
        """
        trust = self.estimator.trust if isinstance(self.estimator, RicciFlow) else None
        items = [item for item in weights if _has_cells(item)]
        if trust is None or not items:
            yield
            return
        before = [item.weight.detach().clone() for item in items]
        reaches = [trust * item.quantizer.half_cell(item.weight) for item in items]
        yield
        with torch.no_grad():
            for item, start, reach in zip(items, before, reaches, strict=True):
                item.weight.clamp_(start - reach, start + reach)

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
                corrected = gradient
                if self.on != "activations":
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
    def applies_flow(self) -> bool:
        """Whether the flow that `measure` and `decay` describe acts on gradients in training.

        Otherwise it is a probe: what the flow of rows of weights would do.
        """
        flow = self.estimator
        return (
            self.on != "activations"
            and isinstance(flow, RicciFlow)
            and flow.correction in ("natural", "pullback")
            and flow.flow != "none"
            and flow.time > 0
            and flow.block != 1
        )

    @property
    def _flow(self) -> RicciFlow:
        """The estimator's own; those without a metric of several weights have rows measured."""
        if not isinstance(self.estimator, RicciFlow):
            return RicciFlow()
        single = self.estimator.block == 1 or self.estimator.correction == "staircase"
        return RicciFlow(time=self.estimator.time) if single else self.estimator


def override_forward(model: nn.Module, correction: Correction) -> list[nn.Module]:
    """Let an estimator that is `Perturbing` say what a converted model rounds in training.

    Returns:
        The quantizers that were given a `perturbation`.
    """
    estimator = correction.estimator
    if not isinstance(estimator, Perturbing):
        return []
    chosen = []
    for module in model.modules():
        weights = isinstance(module, WeightQuantizer) and correction.on != "activations"
        if weights or (isinstance(module, ActivationQuantizer) and correction.on != "weights"):
            setattr(module, "perturbation", estimator.perturb)  # noqa: B010  mypy takes it for a tensor
            chosen.append(module)
    return chosen


class Attachment:
    """An estimator on a converted model, for the length of training.

    Attributes:
        activations: what corrects the gradients of activations, if the correction is for them.
    """

    def __init__(
        self, model: nn.Module, correction: Correction, average: nn.Module | None = None
    ) -> None:
        """Give the quantizers what the estimator needs there: hooks, slopes, what is rounded.

        Args:
            model: the one whose gradients are corrected.
            correction: what is done to them.
            average: a copy of it that only goes forward.
        """
        networks = [model] if average is None or average is model else [model, average]
        self._displaced = [
            module for network in networks for module in override_forward(network, correction)
        ]
        self.activations: ActivationCorrection | None = None
        if correction.on != "weights":
            self.activations = ActivationCorrection(model, correction.estimator)

    def detach(self) -> None:
        """Leave the quantizers as they were; once is enough, and more does no harm."""
        for module in self._displaced:
            vars(module).pop("perturbation", None)  # that of the class is None
        if self.activations is not None:
            self.activations.detach()


class ActivationCorrection:
    """Applies an estimator to the gradients that a model's activation quantizers hand back.

    An estimator whose factor depends on the residual alone becomes the slope of the quantizers with
    fewer than 8 bits, a part of their backward. Any other is given rows: what one picture has at
    one quantizer, where a kernel is one activation.
    """

    def __init__(self, model: nn.Module, estimator: Estimator) -> None:
        """Hook into every activation quantizer of a converted model."""
        self.estimator = estimator
        self.quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
        self.progress = -1.0
        self.has_slope = estimator.slope(2, SLOPE_SAMPLES, 0.0) is not None
        self.advance(0.0)
        self._handles: list[RemovableHandle] = []
        if not self.has_slope:
            self._handles = [q.register_forward_pre_hook(self._watch) for q in self.quantizers]

    def detach(self) -> None:
        """Take hooks and slopes off the quantizers again."""
        for handle in self._handles:
            handle.remove()
        for quantizer in self.quantizers:
            vars(quantizer).pop("slope", None)  # that of the class is None

    def advance(self, progress: float) -> None:
        """Tell what share of the training is done, from 0 to 1, before each step."""
        same_stage = round(progress * STAGES) == round(self.progress * STAGES)
        self.progress = progress
        if same_stage:
            return
        self.set_slopes()

    def set_slopes(self) -> None:
        """Give every quantizer the slope that its width has at this moment of training."""
        for quantizer in self.quantizers:
            slope = None
            if quantizer.bits < 8:
                slope = self.estimator.slope(2**quantizer.bits, SLOPE_SAMPLES, self.progress)
            quantizer.slope = None if slope is None else slope.to(quantizer.zero_point.device)

    @contextmanager
    def measuring(self) -> Iterator[dict[nn.Module, float]]:
        """Around forward and backward: how far the gradients at each quantizer are turned.

        Yields:
            For each, once the backward is through, the cosine between the gradient of its inputs
            that the straight-through estimator gives and the corrected one.
        """
        cosines: dict[nn.Module, float] = {}

        def watch(quantizer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                hook = partial(note, quantizer=quantizer, x=inputs[0].detach())
                output.register_hook(hook)  # type: ignore[no-untyped-call]

        @torch.no_grad()
        def note(gradient: Tensor, quantizer: nn.Module, x: Tensor) -> None:
            assert isinstance(quantizer, ActivationQuantizer)
            xi, mask = _coordinate(self.estimator, x, quantizer)
            plain = gradient.flatten(1).float() * mask
            if self.has_slope:
                part = (gradient * quantizer.slope_at(x)).flatten(1)
            else:
                part = self.estimator.correct(plain, xi, mask=mask, progress=self.progress)
            pair = plain.flatten(), part.flatten()
            cosines[quantizer] = torch.cosine_similarity(*pair, dim=0, eps=1e-30).item()

        handles = [quantizer.register_forward_hook(watch) for quantizer in self.quantizers]
        try:
            yield cosines
        finally:
            for handle in handles:
                handle.remove()

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


def _has_cells(item: DiscreteWeight) -> bool:
    plain = isinstance(item.quantizer.standardize, nn.Identity)
    return plain and item.quantizer.bits != 8


def _gradient(item: DiscreteWeight) -> Tensor:
    assert item.weight.grad is not None
    return item.weight.grad.flatten(1)


def _kernel(weight: Tensor) -> int:
    """How many weights make a kernel: one input channel's, or one weight of a linear layer."""
    return weight[0, 0].numel()
