"""Top-1, top-5, loss and agreement of predict functions, torch or ONNX, in one pass over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.errors import DataError, DivergedError
from ricciq.networks import check_logits, logits_of

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Metrics:
    """Accuracy of a model, and its agreement with a reference.

    Attributes:
        top1: percent of samples whose most likely class is the target.
        top5: percent of samples whose target is among the five most likely classes.
        loss: mean cross-entropy, nats.
        samples: number of samples.
        agreement: percent of samples with the same most likely class as the reference.
        max_abs_diff: largest absolute difference of a logit from the reference's.
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
        shares: (N,) softmax probability of these classes, 0 to 1.
    """

    classes: Tensor
    shares: Tensor


def pooled(parts: Sequence[Metrics]) -> Metrics:
    """The metrics over all samples, from those of disjoint parts."""
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
    """Evaluate several models on the same images.

    Args:
        predictors: functions from images (B, C, H, W) to logits (B, classes), by name.
        batches: images (B, C, H, W) and integer targets (B,).
        reference: name of the model to compute agreement with; None is the first.

    Returns:
        The metrics of each model, by name.

    Raises:
        DataError: there is no image, or a target is not among the classes.
        ModelError: a model does not return one row of logits for each image.
        DivergedError: a model returns NaN or infinity.
    """
    return evaluate_with_predictions(predictors, batches, reference)[0]


@torch.inference_mode()
def evaluate_with_predictions(
    predictors: Mapping[str, Predict],
    batches: Iterable[tuple[Tensor, Tensor]],
    reference: str | None = None,
) -> tuple[dict[str, Metrics], dict[str, Predictions]]:
    """As `evaluate`, and also return what each model predicts for every image.

    Args:
        predictors: as for `evaluate`.
        batches: as for `evaluate`.
        reference: as for `evaluate`.

    Returns:
        The metrics and the predictions of each model, by name; predictions in the images' order.

    Raises:
        DataError: as `evaluate`.
        ModelError: as `evaluate`.
        DivergedError: as `evaluate`.
    """
    reference = reference or next(iter(predictors))
    tallies = {name: _Tally() for name in predictors}
    guesses: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in predictors}
    samples = 0
    for images, targets in batches:
        logits = {
            name: logits_of(predict(images)).float().cpu() for name, predict in predictors.items()
        }
        answers = targets.cpu()
        for name, rows in logits.items():
            check_logits(rows, len(images), f"the {name} model")
        classes = logits[reference].shape[1]
        low, high = (int(end) for end in answers.aminmax())
        if low < 0 or high >= classes:
            raise DataError(
                f"the data has class number {low if low < 0 else high}, but the model has "
                f"{classes} classes; give the data that the model was trained for"
            )
        for name, rows in logits.items():
            if not rows.isfinite().all():
                raise DivergedError(
                    f"the {name} model returns NaN or infinite logits; check its weights, or "
                    "lower --lr if they were just trained"
                )
        samples += len(targets)
        for name, tally in tallies.items():
            tally.add(logits[name], answers, logits[reference])
            shares, likeliest = logits[name].softmax(1).max(1)
            guesses[name].append((likeliest, shares))
    if not samples:
        raise DataError("there are no images to evaluate on; check the data folder")
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
def in_float32() -> Iterator[None]:
    """Compute in whole float32 numbers on a GPU for a block.

    By default its convolutions use TF32, whose 10 bits tell codes apart but not sums of them: more
    activations would fall on the other side of a rounding tie than in the file.
    """
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a block, and restore the mode of every module after it.

    What `torch.compile` has compiled runs as it was before: hooks see all of its modules then.
    """
    modes = [(module, module.training) for module in model.modules()]
    with suppress(NotImplementedError):  # a program of torch.export has only one mode
        model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
