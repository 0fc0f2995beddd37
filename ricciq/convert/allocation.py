"""Bits for every layer out of one budget: the exact solution of a multiple-choice knapsack."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp

from ricciq.convert.sensitivity import Sensitivity
from ricciq.errors import UsageError

Array = npt.NDArray[np.float64]
PRECISION = 1e3
"""What objectives near 1 are multiplied by: the solver takes a gap of 1e-6 for none."""
ALIKE = 1e-9
"""Relative difference of losses that decides nothing."""
TINY = 1e-300
_ALONE = threading.Lock()  # there is one standard output


class Overhead(NamedTuple):
    """Bits that a file takes beside the codes of weights, by width.

    Attributes:
        each: of every layer of that width.
        once: where any layer has that width, as for a table they share.
    """

    each: Mapping[int, float]
    once: Mapping[int, float]


def allocate(
    layers: Sequence[Sensitivity], budget: float, overhead: Overhead | None = None
) -> dict[str, int]:
    """Choose a width for each layer so that the divergences add up to the least there is.

    Args:
        layers: what the widths of each cost; all have the same ones.
        budget: how many bits all weights together may take.
        overhead: what is taken out of the budget besides; nothing unless told.

    Returns:
        The widths, by name.

    Raises:
        UsageError: the budget is below the least that can be had.
    """
    widths = list(layers[0].divergence)
    each, once = overhead or Overhead({}, {})
    count, kinds = len(layers), len(widths)
    # A variable for each layer and width, then one for each width that is used at all.
    lost = np.array([layer.divergence[bits] for layer in layers for bits in widths])
    lost = np.concatenate([lost, np.zeros(kinds)])
    taking = [layer.parameters * bits + each.get(bits, 0) for layer in layers for bits in widths]
    size = np.array([*taking, *(once.get(bits, 0) for bits in widths)], dtype=np.float64)
    one_width = np.hstack([np.kron(np.eye(count), np.ones(kinds)), np.zeros((count, kinds))])
    is_used = np.hstack([np.kron(np.ones(count), np.eye(kinds)), -count * np.eye(kinds)])
    rules = [
        LinearConstraint(one_width, 1, 1),
        LinearConstraint(is_used, -np.inf, 0),
        LinearConstraint(size / max(budget, 1.0), -np.inf, 1 + 1e-12),
    ]

    def best(objective: Array, allowed: Array, *more: LinearConstraint) -> Array | None:
        with _silent():
            found = milp(
                objective * PRECISION,
                integrality=np.ones(len(size)),
                bounds=Bounds(0, allowed),
                constraints=[*rules, *more],
                options={"mip_rel_gap": 0.0},
            )
        return None if found.x is None else found.x.round()

    taken = best(lost / max(lost.max(), TINY), np.ones(len(size)))
    if taken is None:
        raise UsageError(
            f"{budget / 8:.0f} bytes are too few for the weights, even with {min(widths)} bit "
            "each; give a larger budget"
        )
    # Again in units of what is lost so far, since the solver stops at an absolute gap; and then
    # the smallest of solutions that lose as little.
    allowed = (lost <= lost @ taken).astype(float)
    if least := lost @ taken:
        finer = best(np.minimum(lost / least, 2.0), allowed)
        taken = taken if finer is None or lost @ finer > least else finer
        least = lost @ taken
        allowed = (lost <= least).astype(float)
    alike = [LinearConstraint(lost / least, -np.inf, 1 + ALIKE)] if least else []
    smaller = best(size / size.sum(), allowed, *alike)
    if smaller is not None and lost @ smaller <= least * (1 + ALIKE):
        taken = smaller
    places = taken[: count * kinds].reshape(count, kinds).argmax(1)
    return {layer.name: widths[n] for layer, n in zip(layers, places, strict=True)}


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what the solver prints for its makers from standard output, where scripts read JSON.

    It goes through C's buffer, which is written when the process ends if not before.
    """
    library = ctypes.CDLL("ucrtbase" if os.name == "nt" else None)
    with _ALONE:
        library.fflush(None)  # what others have printed
        try:
            kept = os.dup(1)
        except OSError:  # closed, so nothing can get there
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            yield
        finally:
            library.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


def average_bits(layers: Sequence[Sensitivity], chosen: Mapping[str, int]) -> float:
    """Bits a weight, over these layers."""
    weights = sum(layer.parameters for layer in layers)
    return sum(layer.parameters * chosen[layer.name] for layer in layers) / weights
