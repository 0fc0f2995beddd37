"""Weights: one scale for each output channel."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ricciq.quant.codebook import Codebook
from ricciq.quant.fake_quantize import (
    MIN_SCALE,
    fake_quantize,
    positive,
)
from ricciq.quant.grid import LARGEST_CODE, Bits, Grid
from ricciq.quant.quantizer import CODEBOOK_WIDTHS, Place, WeightKind, displaced, residual_in_cell


class WeightQuantizer(nn.Module):
    """Per-channel fake quantization of a weight: one step for each output channel.

    Args:
        rows: output channels.
        bits: 1 to 8 or ``"ternary"``.
        standardize: what the layer does to its weight before using it, done before rounding; the
            methods take the weight as the layer stores it.
        kind: see `Kinds`.

    Raises:
        ValueError: a codebook has no such width.
    """

    levels: nn.Parameter | None
    """Of a codebook: its codes before rounding, over the largest there may be."""
    place: Place | None = None

    def __init__(
        self,
        rows: int,
        bits: Bits,
        standardize: nn.Module | None = None,
        kind: WeightKind = "lsq",
    ) -> None:
        super().__init__()
        self.kind = kind
        self.set_bits(bits)
        learned = kind == "codebook" and bits != 8  # where int8 holds no more, all are taken
        if learned and bits not in CODEBOOK_WIDTHS:
            raise ValueError(f"bits is {bits!r}; a codebook takes 1, 2, 4 or ternary.")
        # How many codes of a codebook, at first evenly spaced, make one of the grid's.
        codes = self.fixed_grid.codes.float()
        self.unit = float(LARGEST_CODE / codes.abs().max()) if learned else 1.0
        levels = nn.Parameter(codes * self.unit / LARGEST_CODE) if learned else None
        self.register_parameter("levels", levels)
        self.standardize = standardize or nn.Identity()
        if kind == "dorefa" and bits != 1:
            self.standardize = nn.Sequential(self.standardize, nn.Tanh())
        fixed = kind in ("dorefa", "fixed")
        self.log_scale = nn.Parameter(torch.zeros(rows), requires_grad=not fixed)

    def set_bits(self, bits: Bits) -> None:
        """Take another width; the steps are then to be found anew, and a codebook cannot."""
        self.bits = bits
        self.fixed_grid = Grid.for_weights(bits, odd=self.kind in ("odd", "dorefa"))
        if self.kind == "dorefa":  # nothing lies beyond its ends, but for two levels, eq. 7
            self.fixed_grid = replace(self.fixed_grid, clips=False)

    @property
    def unrounded(self) -> nn.Module:
        """What the layer itself does to its weight: `standardize` without DoReFa's tanh."""
        own = self.standardize
        return own[0] if isinstance(own, nn.Sequential) and isinstance(own[-1], nn.Tanh) else own

    @property
    def grid(self) -> Grid | Codebook:
        """The codes, those of a codebook as they are now."""
        if self.levels is None:
            return self.fixed_grid
        codes = (self.levels.detach() * LARGEST_CODE).round()
        return Codebook(codes.clamp(-LARGEST_CODE, LARGEST_CODE).sort().values)

    @property
    def scale(self) -> Tensor:
        """The steps, shape (rows,), positive."""
        return positive(self.log_scale.detach())

    @torch.no_grad()
    def calibrate(self, weight: Tensor, candidates: int = 100) -> None:
        """Set each row's step to the candidate with the least squared rounding error.

        A row of zeros takes the mean step of the others, so that training finds it in reach; at one
        bit, where no code is zero, 1/64 of it, which keeps the row near zero.

        Args:
            weight: (rows, ...), on the quantizer's device.
            candidates: how many steps to try, evenly spaced up to the one that clips nothing.
        """
        rows = self.standardize(weight).flatten(1).float()
        if self.kind == "dorefa":
            self.log_scale.data = self._spread(rows)
            return
        largest = rows.abs().amax(1, keepdim=True)
        live = largest > 0
        top = largest.clamp_min(MIN_SCALE) / max(1, self.grid.high)
        best = torch.full_like(top, math.inf)
        chosen = top.clone()
        grid = self.grid
        for fraction in torch.linspace(1 / candidates, 1, candidates).tolist():
            scale = top * fraction
            error = (grid.round(rows / scale) * scale - rows).square().sum(1, keepdim=True)
            chosen = torch.where(error < best, scale, chosen)
            best = torch.minimum(error, best)
        usual = chosen[live].mean() if live.any() else chosen.new_ones(())
        chosen = torch.where(live, chosen, usual / 64 if self.bits == 1 else usual)
        self.log_scale.copy_(chosen.clamp_min(MIN_SCALE).log().squeeze(1))
        if self.levels is not None:
            self._spread_levels(rows[live.squeeze(1)] / chosen[live.squeeze(1)])

    def _spread_levels(self, ratio: Tensor, rounds: int = 20) -> None:
        """Lloyd's algorithm: each level goes to the mean of what is nearest to it."""
        assert self.levels is not None
        for _ in range(rounds):
            grid = self.grid
            assert isinstance(grid, Codebook)
            index = grid.index(ratio).flatten()
            sums = torch.zeros_like(grid.codes).index_add_(0, index, ratio.flatten())
            counts = torch.bincount(index, minlength=len(sums))
            means = torch.where(counts > 0, sums / counts.clamp_min(1), grid.codes)
            self.levels.copy_((means / LARGEST_CODE).clamp(-1, 1))

    def _spread(self, rows: Tensor) -> Tensor:
        """DoReFa's log steps, all alike: the layer's largest weight is at the end of the grid."""
        rows = rows.detach().abs()
        scale = rows.mean() if self.bits == 1 else rows.max() / self.grid.high
        return scale.clamp_min(MIN_SCALE).log().float().repeat(len(self.log_scale))

    def forward(self, weight: Tensor) -> Tensor:
        """The discretized weight, same shape as ``weight``."""
        standardized = self.standardize(weight)
        if self.kind == "dorefa":
            self.log_scale.data = self._spread(standardized)
        # A codebook's step is smaller by the unit, and its codes are larger.
        gain = 1 / math.sqrt(weight[0].numel() * self.fixed_grid.high) / self.unit**2
        log_scale, grid = self._columns(self.log_scale, weight), self.grid
        if self.training and self.place is not None:
            standardized = displaced(standardized, log_scale, None, grid, gain, self.place)
        discrete = fake_quantize(standardized, log_scale, grid, gain=gain)
        if self.levels is None or not isinstance(grid, Codebook):
            return discrete
        # Zero by value; its gradient is that of the levels, with LSQ's gain and of its units.
        scale = self.scale * LARGEST_CODE
        damp = math.sqrt(len(self.levels) / weight.numel()) / scale.mean().square()
        ratio = (standardized / self._columns(self.scale, weight)).detach()
        levels = self.levels.sort().values[grid.index(ratio)]
        return discrete + (levels - levels.detach()) * damp * self._columns(scale, weight)

    @torch.no_grad()
    def ratio(self, weight: Tensor) -> Tensor:
        """The standardized weight in units of its row's step, same shape."""
        ratio: Tensor = self.standardize(weight) / self._columns(self.scale, weight)
        return ratio

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """The integer codes of ``weight``, int8, same shape."""
        return self.grid.round(self.ratio(weight)).to(torch.int8)

    @torch.no_grad()
    def residual(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Where each weight stands in its quantization cell.

        Returns:
            (rows, n) residual in [-1, 1], zero at the level and ±1 at a decision threshold, set to
            zero where the straight-through estimator masks; and the (rows, n) mask, true where not.
        """
        return residual_in_cell(self.ratio(weight).flatten(1), None, self.grid)

    @torch.no_grad()
    def half_cell(self, weight: Tensor) -> Tensor:
        """Half a step of the grid, of a codebook that of its first: one a row, for broadcasting."""
        return self._columns(self.fixed_grid.step / 2 * self.unit * self.scale, weight)

    @torch.no_grad()
    def places(self, weight: Tensor) -> Tensor:
        """Which code each weight has: its number in a codebook, where codes themselves move."""
        grid = self.grid
        return grid.index(self.ratio(weight)) if isinstance(grid, Codebook) else self.codes(weight)

    @torch.no_grad()
    def error(self, weight: Tensor) -> Tensor:
        """What rounding changes, w - Q(w) of the standardized weight: (rows, n), 0 where masked."""
        ratio, grid = self.ratio(weight).flatten(1), self.grid
        codes = grid.round(ratio)
        half = grid.half_cell(ratio - codes, codes)
        return residual_in_cell(ratio, None, grid)[0] * half * self.scale[:, None]

    @staticmethod
    def _columns(per_row: Tensor, weight: Tensor) -> Tensor:
        return per_row.view(-1, *[1] * (weight.dim() - 1))
