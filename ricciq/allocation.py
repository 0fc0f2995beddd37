"""Bits for every layer out of one budget: the exact solution of a multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from ricciq.errors import UsageError
from ricciq.sensitivity import Sensitivity


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
    # A variable for each layer and width, then one for each width that is used at all.
    cost = [layer.divergence[bits] for layer in layers for bits in widths]
    size = [layer.parameters * bits + each.get(bits, 0) for layer in layers for bits in widths]
    size += [once.get(bits, 0) for bits in widths]
    count, kinds = len(layers), len(widths)
    one_width = np.hstack([np.kron(np.eye(count), np.ones(kinds)), np.zeros((count, kinds))])
    is_used = np.hstack([np.kron(np.ones(count), np.eye(kinds)), -count * np.eye(kinds)])
    # Of solutions that lose alike the smallest is wanted; the weight decides nothing else.
    tie = 1e-9 * max(*cost, 1e-12) / sum(size)
    solution = milp(
        np.array([*cost, *[0.0] * kinds]) + tie * np.array(size),
        integrality=np.ones(len(size)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_width, 1, 1),
            LinearConstraint(is_used, -np.inf, 0),
            LinearConstraint(np.array(size) / max(budget, 1.0), -np.inf, 1 + 1e-12),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        raise UsageError(
            f"{budget / 8:.0f} bytes are too few for the weights, even with {min(widths)} bit "
            "each; give a larger budget"
        )
    taken = solution.x[: count * kinds].reshape(count, kinds).argmax(1)
    return {layer.name: widths[n] for layer, n in zip(layers, taken, strict=True)}


def average_bits(layers: Sequence[Sensitivity], chosen: Mapping[str, int]) -> float:
    """Bits a weight, over these layers."""
    weights = sum(layer.parameters for layer in layers)
    return sum(layer.parameters * chosen[layer.name] for layer in layers) / weights
