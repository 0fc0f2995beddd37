"""Top-1, top-5, loss and agreement of predict callables, torch or ONNX, in one pass over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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


class Guesses:
    """A predict callable that remembers its first guesses, and how sure it was.

    Args:
        predict: (B, C, H, W) -> (B, classes) logits.
    """

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self._classes: list[Tensor] = []
        self._shares: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        """The logits, as they are."""
        logits = self._predict(images)
        shares, classes = logits.float().softmax(1).max(1)
        self._classes.append(classes.cpu())
        self._shares.append(shares.cpu())
        return logits

    @property
    def classes(self) -> Tensor:
        """(N,) guesses of all pictures so far."""
        return torch.cat(self._classes)

    @property
    def shares(self) -> Tensor:
        """(N,) softmax of the guesses, 0 to 1."""
        return torch.cat(self._shares)


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


@torch.inference_mode()
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
    reference = reference or next(iter(predictors))
    tallies = {name: _Tally() for name in predictors}
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
    if not samples:
        raise DataError("there is no picture to evaluate on; check the data folder")
    return {
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
