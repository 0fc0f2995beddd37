"""A layer as a linear regression: single outputs, and the inputs that they are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Place = tuple[Tensor, ...]
"""Where outputs are, without their channel: an index along each other axis, (n,) each."""


class Taps(NamedTuple):
    """The inputs along one axis that each output reads.

    Attributes:
        where: (n, kernel size) their indices; beyond the ends they are zero.
        read: (n, kernel size) whether there is an input; None: at each index.
    """

    where: Tensor
    read: Tensor | None = None


def gather(x: Tensor, batch: Tensor, axes: Sequence[Taps], groups: int) -> Tensor:
    """The inputs of some outputs of a convolution.

    Args:
        x: (B, C, *size), the input.
        batch: (n,) the image of each output.
        axes: for each axis of the size.
        groups: of the channels.

    Returns:
        (n, groups, C / groups * kernel elements), in the order of a weight's row.
    """
    n = len(batch)
    places, inside = [batch.view(n, *[1] * len(axes))], torch.ones((), device=x.device)
    for axis, (taps, size) in enumerate(zip(axes, x.shape[2:], strict=True)):
        shape = [n, *(-1 if other == axis else 1 for other in range(len(axes)))]
        exists = (taps.where >= 0) & (taps.where < size)
        exists = exists if taps.read is None else exists & taps.read
        places.append(taps.where.clamp(0, size - 1).view(shape))
        inside = inside * exists.view(shape)
    found = x.movedim(1, -1)[tuple(places)] * inside.unsqueeze(-1)  # (n, *kernel, C)
    return found.movedim(-1, 1).reshape(n, groups, -1)


def outputs(rows: Tensor, weight: Tensor) -> Tensor:
    """The products of inputs and weights, (n, rows of the weight).

    Args:
        rows: (n, groups, k), from `QuantLayer.rows_at`.
        weight: (rows, ...), k elements a row.
    """
    _, groups, k = rows.shape
    found = rows.transpose(0, 1) @ weight.reshape(groups, -1, k).transpose(1, 2)
    return found.transpose(0, 1).flatten(1)


def random_places(
    shape: Sequence[int], channel: int, most: int, generator: torch.Generator
) -> Place:
    """Some outputs of a layer, without repetition.

    Args:
        shape: of the output.
        channel: the axis of the channels.
        most: how many outputs.
        generator: of random numbers, on the CPU.
    """
    size = [n for axis, n in enumerate(shape) if axis != channel % len(shape)]
    chosen = torch.randperm(torch.Size(size).numel(), generator=generator)[:most]
    return tuple(torch.unravel_index(chosen, size))


def values_at(y: Tensor, channel: int, place: Place) -> Tensor:
    """The channels of some outputs, (n, channels).

    Args:
        y: the whole output.
        channel: the axis of its channels.
        place: from `random_places`.
    """
    return y.movedim(channel, -1)[place]
