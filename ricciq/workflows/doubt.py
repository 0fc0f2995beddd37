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
    labels = np.unique(targets)
    if len(labels) > MOST_CLASSES:
        return None
    known = np.isin(predicted, labels)  # another order of these is looked for
    half = np.arange(len(targets)) % 2
    found_on = np.zeros((len(labels), len(labels)))
    at = known & (half == 0)
    np.add.at(found_on, tuple(np.searchsorted(labels, x[at]) for x in (targets, predicted)), 1)
    truths, guesses = linear_sum_assignment(found_on, maximize=True)
    meant = dict(zip(labels[guesses], labels[truths], strict=True))
    tried, hits = targets[half == 1], predicted[half == 1]
    in_order = np.array([meant.get(guess, -1) for guess in hits]) == tried
    as_given = hits == tried
    better, worse = (in_order & ~as_given).sum(), (as_given & ~in_order).sum()
    mended = better - worse > (~as_given).sum() / 2
    significant = binom.sf(better - 1, better + worse, 0.5) <= SIGNIFICANCE
    return float(in_order.mean()) if mended and significant else None
