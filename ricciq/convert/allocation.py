"""Bits for every layer out of one budget: the exact solution of a multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ricciq.convert.sensitivity import Sensitivity
from ricciq.errors import UsageError

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
SLACK = 1 + 1e-9
"""Sums of divergences that differ by no larger factor count as equal."""


class Overhead(NamedTuple):
    """Bits that a file needs in addition to the weight codes, by width.

    Attributes:
        each: for every layer of that width.
        once: if any layer has that width, such as for a table that layers share.
    """

    each: Mapping[int, float]
    once: Mapping[int, float]


class Solution(NamedTuple):
    """One width for each layer.

    Attributes:
        lost: sum of the divergences, in nats.
        size: bits.
        choice: the index of each layer's width.
    """

    lost: float
    size: float
    choice: list[int]


def allocate(
    layers: Sequence[Sensitivity], budget: float, overhead: Overhead | None = None
) -> dict[str, int]:
    """Choose a width for each layer so that the sum of the divergences is minimal.

    Of solutions with equal sums, the smallest is chosen.

    Args:
        layers: the divergences of each layer; all have the same widths.
        budget: how many bits all weights together may take; may be infinite.
        overhead: what else counts against the budget; by default nothing. What a layer takes is
            rounded up to whole bits.

    Returns:
        The width of each layer, by name.

    Raises:
        UsageError: the budget is smaller than the smallest possible size.
    """
    widths = list(layers[0].divergence)
    each, once = overhead or Overhead({}, {})
    lost = np.array([[layer.divergence[bits] for bits in widths] for layer in layers])
    size = np.array(
        [[layer.parameters * b + math.ceil(each.get(b, 0)) for b in widths] for layer in layers]
    )
    solutions: list[Solution] = []
    least = math.inf
    # What is paid once depends on which widths occur at all. Few of the subsets are as good as the
    # ones before, and the bound ends the others early.
    fewest = 1 if any(once.values()) else len(widths)
    for count in range(len(widths), fewest - 1, -1):
        for subset in combinations(range(len(widths)), count):
            fixed = sum(once.get(widths[n], 0) for n in subset)
            found = _solve(lost[:, subset], size[:, subset], budget - fixed, least)
            if found is not None:
                least = min(least, found.lost)
                choice = [widths[subset[n]] for n in found.choice]
                solutions.append(Solution(found.lost, found.size + fixed, choice))
    if not solutions:
        raise UsageError(
            f"{budget / 8:.0f} bytes are too few for the weights, even with {min(widths)} bit "
            "each; give a larger budget"
        )
    alike = [solution for solution in solutions if solution.lost <= least * SLACK]
    chosen = min(alike, key=lambda solution: solution.size).choice
    return {layer.name: bits for layer, bits in zip(layers, chosen, strict=True)}


def _solve(lost: Array, size: Integers, budget: float, least: float) -> Solution | None:
    """Dynamic program over the layers, which keeps only partial choices that can still be best.

    A partial choice is dropped if another one loses no more and is no larger, or if its lower bound
    exceeds the best solution known. Bounds are those of the linear relaxation.

    Args:
        lost: (layers, widths) divergences.
        size: (layers, widths) bits.
        budget: bits.
        least: sum of divergences of the best solution known so far.

    Returns:
        The best solution, or None if none fits or all lose more than `least`.
    """
    sums, sizes = np.zeros(1), np.zeros(1, dtype=np.int64)
    steps: list[tuple[Integers, Integers]] = []
    for n, (x, y) in enumerate(_relaxations(lost, size)):
        # Layer n has been chosen; (x, y) relaxes the layers after it.
        sums, sizes = (sums[:, None] + lost[n]).ravel(), (sizes[:, None] + size[n]).ravel()
        order = np.lexsort((sums, sizes))
        before = np.minimum.accumulate(np.concatenate([[math.inf], sums[order][:-1]]))
        kept = order[(sums[order] < before) & (sizes[order] + x[0] <= budget)]
        room = budget - sizes[kept]
        upper = sums[kept] + y[np.searchsorted(x, room, side="right") - 1]
        lower = np.minimum(sums[kept] + np.interp(room, x, y), upper)
        least = min(least, upper.min(initial=math.inf))
        kept = kept[lower <= least * SLACK]
        if not len(kept):
            return None
        steps.append(np.divmod(kept, lost.shape[1]))
        sums, sizes = sums[kept], sizes[kept]
    last = int(np.argmax(sums <= sums.min() * SLACK))  # sizes ascend, so this one is the smallest
    at, choice = last, []
    for parents, widths in reversed(steps):
        choice.append(int(widths[at]))
        at = int(parents[at])
    return Solution(float(sums[last]), float(sizes[last]), choice[::-1])


def _relaxations(lost: Array, size: Integers) -> Iterator[tuple[Integers, Array]]:
    """For each layer, the least loss of all layers after it, as a convex function of their size.

    Yields:
        The function's corners: sizes, ascending, and losses. At a corner no layer has a fractional
        choice, so the loss there can be reached.
    """
    hulls = [_hull(*pairs) for pairs in zip(lost, size, strict=True)]
    for n in range(1, len(hulls) + 1):
        after = hulls[n:]
        widths = np.concatenate([np.diff(x) for x, _ in after] or [np.zeros(0, dtype=np.int64)])
        drops = np.concatenate([-np.diff(y) for _, y in after] or [np.zeros(0)])
        steepest = np.argsort(-drops / widths, kind="stable")
        x = np.cumsum([sum(int(x[0]) for x, _ in after), *widths[steepest]])
        # Summed from the small end, since what is lost there may be a millionth of the other end.
        y = np.cumsum([sum(float(y[-1]) for _, y in after), *drops[steepest][::-1]])[::-1]
        yield x, y


def _hull(lost: Array, size: Integers) -> tuple[Integers, Array]:
    """Corners of the lower convex hull of one layer's widths, from the smallest size on."""
    corners: list[tuple[int, float]] = []
    for x, y in sorted(zip(size.tolist(), lost.tolist(), strict=True)):
        if corners and y >= corners[-1][1]:
            continue
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            corners.pop()
        corners.append((x, y))
    return np.array([x for x, _ in corners]), np.array([y for _, y in corners])


def average_bits(layers: Sequence[Sensitivity], chosen: Mapping[str, int]) -> float:
    """Mean width of these layers' weights.

    Args:
        layers: which layers count.
        chosen: the width of each layer, by name.
    """
    weights = sum(layer.parameters for layer in layers)
    return sum(layer.parameters * chosen[layer.name] for layer in layers) / weights
