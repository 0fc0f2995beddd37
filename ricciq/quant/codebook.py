"""Codebooks: learned codes in place of evenly spaced ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ricciq.quant.grid import LARGEST_CODE, Bits, Grid
from ricciq.quant.lsq import LSQWeights
from ricciq.quant.weight import WeightQuantizer


@dataclass(frozen=True, eq=False)
class Codebook(Grid):
    """Any int8 codes, such as learned ones; a number goes to the nearest.

    A lookup table that unpacks bits to int8 holds any codes, so a file with a codebook is as small
    and as fast as one with a `UniformGrid`.

    Attributes:
        codes: (size,), integers up to `LARGEST_CODE` in floating point, not decreasing.
    """

    codes: Tensor

    is_consecutive = False

    @property
    def low(self) -> int:  # type: ignore[override]
        """The lowest code."""
        return int(self.codes[0])

    @property
    def high(self) -> int:  # type: ignore[override]
        """The highest code."""
        return int(self.codes[-1])

    @property
    def thresholds(self) -> Tensor:
        """Halfway between neighbours, (size - 1,)."""
        return (self.codes[1:] + self.codes[:-1]) / 2

    def index(self, ratio: Tensor) -> Tensor:
        """See `Grid.index`."""
        return torch.bucketize(ratio.contiguous(), self.thresholds, right=True)

    def round(self, ratio: Tensor) -> Tensor:
        """See `Grid.round`."""
        return self.codes[self.index(ratio)]

    def half_cell(self, error: Tensor, codes: Tensor) -> Tensor:
        """See `Grid.half_cell`; beyond the last threshold as on the other side of the code."""
        apart = torch.unique_consecutive(self.codes)  # two codes may have become one
        if len(apart) == 1:
            return torch.ones_like(error)
        gaps = apart.diff() / 2
        index = torch.searchsorted(apart, codes.contiguous())
        below, above = (gaps[(index + side).clamp(0, len(gaps) - 1)] for side in (-1, 0))
        return torch.where(error < 0, below, above)

    def mask(self, grad: Tensor, ratio: Tensor) -> Tensor:
        """See `Grid.mask`."""
        return grad.where((ratio >= self.codes[0]) & (ratio <= self.codes[-1]), 0)


class CodebookWeights(WeightQuantizer):
    """Weights with a learned scale per channel and learned codes per layer.

    Attributes:
        levels: the codes before rounding, in units of `LARGEST_CODE`, (size,).
        unit: how many codes make one of the evenly spaced ones that they start from.

    Args:
        rows: output channels.
        bits: 1 to 8 or ``"ternary"``.
        standardize: as for `WeightQuantizer`.
    """

    def __init__(self, rows: int, bits: Bits, standardize: nn.Module | None = None) -> None:
        super().__init__(rows, bits, standardize)
        codes = self.uniform_grid.codes.float()
        self.unit = float(LARGEST_CODE / codes.abs().max())
        self.levels = nn.Parameter(codes * self.unit / LARGEST_CODE)

    @classmethod
    def for_width(cls, bits: Bits) -> type[WeightQuantizer]:
        """At 8 bits, where all that int8 holds are codes, learned scales alone."""
        return LSQWeights if bits == 8 else cls

    @property
    def grid(self) -> Codebook:
        """The codes, as they are now."""
        codes = (self.levels.detach() * LARGEST_CODE).round()
        return Codebook(codes.clamp(-LARGEST_CODE, LARGEST_CODE).sort().values)

    @property
    def why_not_frozen(self) -> str | None:
        """See `WeightQuantizer.why_not_frozen`: levels move."""
        return super().why_not_frozen or "whose codebook moves"

    def set_bits(self, bits: Bits) -> None:
        """Refuse: another width has another number of levels.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"a codebook cannot change its width from {self.bits} to {bits}")

    def _fit(self, rows: Tensor, candidates: int) -> Tensor:
        scale = super()._fit(rows, candidates)
        live = rows.abs().amax(1) > 0
        self._spread_levels(rows[live] / scale[live])
        return scale

    def _spread_levels(self, ratio: Tensor, rounds: int = 20) -> None:
        """Lloyd's algorithm: each level goes to the mean of what is nearest to it."""
        for _ in range(rounds):
            grid = self.grid
            index = grid.index(ratio).flatten()
            sums = torch.zeros_like(grid.codes).index_add_(0, index, ratio.flatten())
            counts = torch.bincount(index, minlength=len(sums))
            means = torch.where(counts > 0, sums / counts.clamp_min(1), grid.codes)
            self.levels.copy_((means / LARGEST_CODE).clamp(-1, 1))

    def _discretize(self, standardized: Tensor) -> Tensor:
        discrete = super()._discretize(standardized)
        # Zero by value; its gradient is that of the levels, with LSQ's gain and of its units.
        scale = self.scale * LARGEST_CODE
        damp = math.sqrt(len(self.levels) / standardized.numel()) / scale.mean().square()
        ratio = (standardized / self._columns(self.scale, standardized)).detach()
        levels = self.levels.sort().values[self.grid.index(ratio)]
        return discrete + (levels - levels.detach()) * damp * self._columns(scale, standardized)

    def _gain(self, weight: Tensor) -> float:
        """LSQ's, in its units: a codebook's scale is smaller by the unit, and codes are larger."""
        return super()._gain(weight) / self.unit**2

    @torch.no_grad()
    def cells(self, weight: Tensor) -> Tensor:
        """The index of each weight's code."""
        return self.grid.index(self.ratio(weight))

    @torch.no_grad()
    def half_cell(self, weight: Tensor) -> Tensor:
        """Half the distance of the levels at the start, a number a row, for broadcasting."""
        return super().half_cell(weight) * self.unit
