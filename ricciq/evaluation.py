"""Top-1, top-5, loss and agreement of predict callables, torch or ONNX, in one pass over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.errors import DataError, DivergedError, ModelError

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Metrics:
    """How well a model did.

    Attributes:
        top1: percent of samples whose first guess was right.
        top5: percent with the right class among the first five guesses.
        loss: mean cross-entropy, nats.
        samples: how many were seen.
        agreement: percent of samples with the reference's first guess.
        max_abs_diff: largest difference of a logit from the reference's.
    """

    top1: float
    top5: float
    loss: float
    samples: int
    agreement: float
    max_abs_diff: float


class Predictions(NamedTuple):
    """The most likely class of every image, and its probability.

    Attributes:
        classes: (N,) int64.
        shares: (N,) softmax of these classes, 0 to 1.
    """

    classes: Tensor
    shares: Tensor


def pooled(parts: Sequence[Metrics]) -> Metrics:
    """The metrics of all samples from those of parts that have no sample in common."""
    samples = sum(part.samples for part in parts)

    def mean(name: str) -> float:
        return sum(float(getattr(part, name)) * part.samples for part in parts) / samples

    return Metrics(
        **{name: mean(name) for name in ("top1", "top5", "loss", "agreement")},
        samples=samples,
        max_abs_diff=max(part.max_abs_diff for part in parts),
    )


@dataclass
class _Tally:
    top1: int = 0
    top5: int = 0
    loss: float = 0.0
    agreed: int = 0
    max_abs_diff: float = 0.0

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor) -> None:
        guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = guesses == targets[:, None]
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.any(1).sum())
        self.loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        self.agreed += int((logits.argmax(1) == reference.argmax(1)).sum())
        self.max_abs_diff = max(self.max_abs_diff, float((logits - reference).abs().max()))


def evaluate(
    predictors: Mapping[str, Predict],
    batches: Iterable[tuple[Tensor, Tensor]],
    reference: str | None = None,
) -> dict[str, Metrics]:
    """Show the same pictures to several models.

    Args:
        predictors: functions from (B, C, H, W) to (B, classes) logits, by name.
        batches: pictures and integer targets (B,).
        reference: which of them agreement is counted with; the first unless told.

    Returns:
        The metrics of each.

    Raises:
        DataError: there was no picture, or a target is not among the classes.
        ModelError: a model does not answer with a row of logits a picture.
        DivergedError: a model answers with NaN or infinite numbers.
    """
    return evaluate_with_predictions(predictors, batches, reference)[0]


@torch.inference_mode()
def evaluate_with_predictions(
    predictors: Mapping[str, Predict],
    batches: Iterable[tuple[Tensor, Tensor]],
    reference: str | None = None,
) -> tuple[dict[str, Metrics], dict[str, Predictions]]:
    """As `evaluate`, and what each model predicts for every image, in their order.

    Args:
        predictors: as for `evaluate`.
        batches: as for `evaluate`.
        reference: as for `evaluate`.

    Returns:
        The metrics and the predictions of each.

    Raises:
        RicciqError: as `evaluate`.
    """
    reference = reference or next(iter(predictors))
    tallies = {name: _Tally() for name in predictors}
    guesses: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in predictors}
    samples = 0
    for images, targets in batches:
        logits = {name: predict(images).float().cpu() for name, predict in predictors.items()}
        for name, answers in logits.items():
            if answers.ndim != 2 or len(answers) != len(images):
                raise ModelError(
                    f"the {name} model answers {len(images)} pictures with numbers of shape "
                    f"{list(answers.shape)}, so it is no classifier; choose another model"
                )
        classes = logits[reference].shape[1]
        low, high = (int(end) for end in targets.aminmax())
        if low < 0 or high >= classes:
            raise DataError(
                f"the data has class number {low if low < 0 else high}, the model knows {classes} "
                "classes; give the data the model was made for"
            )
        for name, answers in logits.items():
            if not answers.isfinite().all():
                raise DivergedError(
                    f"the {name} model answers with NaN or infinite numbers; check its weights, "
                    "or lower --lr if they were just trained"
                )
        samples += len(targets)
        for name, tally in tallies.items():
            tally.add(logits[name], targets.cpu(), logits[reference])
            shares, likeliest = logits[name].softmax(1).max(1)
            guesses[name].append((likeliest, shares))
    if not samples:
        raise DataError("there is no picture to evaluate on; check the data folder")
    metrics = {
        name: Metrics(
            top1=100 * tally.top1 / samples,
            top5=100 * tally.top5 / samples,
            loss=tally.loss / samples,
            samples=samples,
            agreement=100 * tally.agreed / samples,
            max_abs_diff=tally.max_abs_diff,
        )
        for name, tally in tallies.items()
    }
    predictions = {
        name: Predictions(*map(torch.cat, zip(*parts, strict=True)))
        for name, parts in guesses.items()
    }
    return metrics, predictions


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a block; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
