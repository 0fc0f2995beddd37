"""Learned codes in the place of a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Codebook:
    """Learned codes: any whole numbers of int8, in the place of a `Grid`.

    A number goes to the nearest of them. A table that turns packed bits into int8 holds any codes,
    so a file that does is as small and as fast as one with a grid.

    Attributes:
        codes: (size,), whole numbers up to `LARGEST_CODE` in floating point, not decreasing.
    """

    codes: Tensor

    has_zero = False
    """Not for certain."""

    @property
    def low(self) -> int:
        """The lowest code."""
        return int(self.codes[0])

    @property
    def high(self) -> int:
        """The highest code."""
        return int(self.codes[-1])

    @property
    def symmetric(self) -> bool:
        """As `Grid.symmetric`."""
        return torch.equal(self.codes, -self.codes.flip(0))

    @property
    def thresholds(self) -> Tensor:
        """Halfway between neighbours, (size - 1,)."""
        return (self.codes[1:] + self.codes[:-1]) / 2

    def index(self, ratio: Tensor) -> Tensor:
        """The place of the nearest code in the list, int64, same shape."""
        return torch.bucketize(ratio.contiguous(), self.thresholds, right=True)

    def round(self, ratio: Tensor) -> Tensor:
        """As `Grid.round`."""
        return self.codes[self.index(ratio)]

    def half_cell(self, error: Tensor, codes: Tensor) -> Tensor:
        """As `Grid.half_cell`; beyond the last threshold as on the other side of the code."""
        apart = torch.unique_consecutive(self.codes)  # two codes may have become one
        if len(apart) == 1:
            return torch.ones_like(error)
        gaps = apart.diff() / 2
        index = torch.searchsorted(apart, codes.contiguous())
        below, above = (gaps[(index + side).clamp(0, len(gaps) - 1)] for side in (-1, 0))
        return torch.where(error < 0, below, above)

    def mask(self, grad: Tensor, ratio: Tensor) -> Tensor:
        """As `Grid.mask`."""
        return grad.where((ratio >= self.codes[0]) & (ratio <= self.codes[-1]), 0)
