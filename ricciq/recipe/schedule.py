"""The schedule for a network and a data set that no shipped recipe was written for.

One table of rules, each with its reason. A rule that says nothing about a task leaves the default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ricciq.models.kind import Kind

SMALL = 64
"""Largest height or width, in pixels, of images for which networks are small."""


class Task(NamedTuple):
    """What is to be trained.

    Attributes:
        images: number of training images, without the hold-out.
        network: kind of the network, as `ricciq.models.kind.network_kind` tells them apart.
        side: larger side of its input, in pixels.
        bits: the smaller width of weights and activations; 32 for float.
    """

    images: int
    network: Kind
    side: int
    bits: int


class Rule(NamedTuple):
    """How one key of a recipe follows from a task.

    Attributes:
        key: dotted, as in ``training.lr``.
        value: from a task; None leaves the default.
        reason: why, or after which source.
    """

    key: str
    value: Callable[[Task], Any]
    reason: str


def epochs_for(images: int, bits: int) -> int:
    """Epochs of training, by the first of `RULES`.

    Args:
        images: number of training images.
        bits: the smaller width of weights and activations; 32 for float.
    """
    epochs: float = 20 * (50_000 / images) ** 0.25
    if 5 <= bits <= 8:
        epochs /= 2
    return round(min(max(epochs, 5), 100))


def _epochs(task: Task) -> int:
    return epochs_for(task.images, task.bits)


def _rate(task: Task) -> float:
    rate = {"batchnorm": 2e-3, "depthwise": 2e-3, "transformer": 1e-3}[task.network]
    if task.side > SMALL:
        rate /= 4
    few = min(1.0, (task.images / 5000) ** 0.3)
    return float(f"{rate * few:.1g}")


RULES = (
    Rule(
        "training.epochs",
        _epochs,
        "With fewer images an epoch has fewer steps, so there are more of them, by the fourth root "
        "of the number; from 5 bits on, rounding changes so little that half of them are enough.",
    ),
    Rule(
        "training.lr",
        _rate,
        "For AdamW, which moves every weight by about this much in a step. The weights of networks "
        "for large images have a larger fan-in and are about four times smaller. With fewer than "
        "5,000 images, large steps forget more of what was learned from others than these teach.",
    ),
    Rule(
        "training.weight_decay",
        lambda task: 0.05 if task.network == "transformer" else None,
        "As transformers were trained (DeiT, arXiv 2012.12877), and quantized (OFQ, arXiv "
        "2302.02210).",
    ),
    Rule(
        "training.warmup_epochs",
        lambda task: 1 if task.network == "transformer" and _epochs(task) > 5 else None,
        "AdamW's first steps are large before its averages settle, which transformers do not "
        "bear (arXiv 2002.04745).",
    ),
    Rule(
        "data.augmentation.auto_augment",
        lambda task: (
            "rand-m9-mstd0.5-inc1" if task.network == "transformer" and task.side > SMALL else None
        ),
        "Transformers overfit without it (DeiT).",
    ),
)
"""The rules, in the order of a recipe's keys."""


def derived(task: Task) -> dict[str, Any]:
    """Keys of a recipe for a task, by `RULES`; a float baseline (32 bits) follows them, too."""
    values = {rule.key: rule.value(task) for rule in RULES}
    return {key: value for key, value in values.items() if value is not None}
