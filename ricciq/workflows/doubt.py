"""Whether the accuracy of a trained model shows that its classes or images are taken wrongly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom

Classes = npt.NDArray[np.int64]
SIGNIFICANCE = 0.05
"""Largest probability of guessing as well, at which a model is better than guessing."""
MOST_CLASSES = 4096
"""With more, another order is not looked for: the table of predictions would fill the memory."""


def doubt(predicted: Classes, targets: Classes, num_classes: int, what: str) -> str | None:
    """A reason to doubt that the outputs of a trained model are the classes of the data.

    Either another order of the classes mends most of the errors: the order is found on one half of
    the images, and tried on the other. Or the top-1 accuracy is not significantly better than that
    of guessing, by a binomial test.

    Args:
        predicted: (N,) most likely class of each image.
        targets: (N,) class of each image.
        num_classes: number of outputs.
        what: the model, for the sentence.

    Returns:
        A sentence with the remedy; None if there is no such reason, or too few images to tell.
    """
    count, hits = len(targets), int((predicted == targets).sum())
    if binom.sf(count - 1, count, 1 / num_classes) > SIGNIFICANCE:  # even if all were right
        return None
    reason = None
    if (ordered := _better_order(predicted, targets)) is not None:
        reason = f"would be {100 * ordered:.2f} % with the classes in another order"
    elif binom.sf(hits - 1, count, 1 / num_classes) > SIGNIFICANCE:
        reason = "is no better than guessing"
    if reason is None:
        return None
    return (
        f"warning: top-1 of {what}, {100 * hits / count:.2f} %, {reason}; give the order of its "
        "outputs with --class-map FILE, or other weights or preprocessing"
    )


def _better_order(predicted: Classes, targets: Classes) -> float | None:
    """The share of images that are right in another order, if that mends most errors."""
    labels, where = np.unique(np.stack([predicted, targets]), return_inverse=True)
    if len(labels) > MOST_CLASSES:
        return None
    guesses, truths = where.reshape(2, -1)
    tables = np.zeros((2, len(labels), len(labels)))
    np.add.at(tables, (np.arange(len(truths)) % 2, truths, guesses), 1)
    found_on, tried_on = tables
    order = linear_sum_assignment(found_on, maximize=True)
    right, as_given = tried_on[order].sum(), tried_on.trace()
    errors = tried_on.sum() - as_given
    return float(right / tried_on.sum()) if right - as_given > errors / 2 else None
