"""Weights: one scale for each output channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ricciq.quant.fake_quantize import MIN_SCALE, fake_quantize
from ricciq.quant.grid import Bits, Grid, UniformGrid
from ricciq.quant.quantizer import Quantizer, perturbed, residual_in_cell
from ricciq.quant.scale_search import best_scales


class WeightQuantizer(Quantizer):
    """Per-channel fake quantization of a weight: one scale for each output channel.

    The base of all quantizers of weights. A subclass changes the codes (`grid_of` where they are
    evenly spaced, else `grid`), what scales are found (`_fit`), or what follows the weight in every
    forward pass (`_follow`).

    Args:
        rows: output channels.
        bits: 1 to 8 or ``"ternary"``.
        standardize: what the layer does to its weight before using it, done before rounding; the
            methods take the weight as the layer stores it.
    """

    zero_point = None

    def __init__(self, rows: int, bits: Bits, standardize: nn.Module | None = None) -> None:
        super().__init__()
        self.bits, self.uniform_grid = bits, self.grid_of(bits)
        self.standardize = standardize or nn.Identity()
        self.log_scale = nn.Parameter(torch.zeros(rows), requires_grad=self.learns_scale)

    @classmethod
    def for_width(cls, bits: Bits) -> type[WeightQuantizer]:  # noqa: ARG003
        """The class that a width takes: this one, or a simpler one that does the same there."""
        return cls

    @staticmethod
    def grid_of(bits: Bits) -> UniformGrid:
        """The evenly spaced codes of a width."""
        return UniformGrid.for_weights(bits)

    @property
    def grid(self) -> Grid:
        """The codes, as they are now."""
        return self.uniform_grid

    def set_bits(self, bits: Bits) -> None:
        """See `Quantizer.set_bits`."""
        self.bits, self.uniform_grid = bits, self.grid_of(bits)

    # Capabilities

    @property
    def can_learn_rounding(self) -> bool:
        """Whether AdaRound can choose between the two codes next to each weight.

        Codes must be integers next to each other, and the stored weight what is rounded. At 8 bits
        there is nothing to gain.
        """
        return self.has_cells and self.grid.is_consecutive

    @property
    def has_cells(self) -> bool:
        """Whether the stored weight is what is rounded, to levels that are far enough apart."""
        return self._rounds_stored_weight and self.bits != 8

    @property
    def why_not_frozen(self) -> str | None:
        """Why no weight can be fixed at its level, as the end of a sentence; None: it can be."""
        return None if self._rounds_stored_weight else "which are standardized"

    @property
    def _rounds_stored_weight(self) -> bool:
        return isinstance(self.standardize, nn.Identity)

    @property
    def layer_standardize(self) -> nn.Module:
        """What the layer itself does to its weight, without what the quantizer adds."""
        return self.standardize

    # Scales

    @torch.no_grad()
    def calibrate(self, weight: Tensor, candidates: int = 100) -> None:
        """Find the scales for a weight.

        Args:
            weight: (rows, ...), on the quantizer's device.
            candidates: how many scales to try; see `best_scales`.
        """
        scale = self._fit(self.standardize(weight).flatten(1).float(), candidates)
        self.log_scale.copy_(scale.clamp_min(MIN_SCALE).log().squeeze(1))

    def _fit(self, rows: Tensor, candidates: int) -> Tensor:
        """The scale with the least squared rounding error for each row, (rows, 1).

        A row of zeros takes the mean scale of the others, so that training finds it in reach; at
        one bit, where no code is zero, 1/64 of it, which keeps the row near zero.
        """
        chosen = best_scales(rows, self.grid, candidates)
        live = rows.abs().amax(1, keepdim=True) > 0
        usual = chosen[live].mean() if live.any() else chosen.new_ones(())
        return torch.where(live, chosen, usual / 64 if self.bits == 1 else usual)

    # Rounding

    def forward(self, weight: Tensor) -> Tensor:
        """The discretized weight, same shape as ``weight``."""
        standardized = self.standardize(weight)
        self._follow(standardized)
        if self.training and self.perturbation is not None:
            log_scale, gain = self._columns(self.log_scale, weight), self._gain(weight)
            standardized = perturbed(
                standardized, log_scale, None, self.grid, gain, self.perturbation
            )
        return self._discretize(standardized)

    def _follow(self, standardized: Tensor) -> None:
        """Set what is not learned but computed from the weight in every forward pass."""

    def _discretize(self, standardized: Tensor) -> Tensor:
        log_scale = self._columns(self.log_scale, standardized)
        return fake_quantize(standardized, log_scale, self.grid, gain=self._gain(standardized))

    def _gain(self, weight: Tensor) -> float:
        """LSQ's factor on the gradient of a scale."""
        return 1 / math.sqrt(weight[0].numel() * self.uniform_grid.high)

    @torch.no_grad()
    def ratio(self, x: Tensor) -> Tensor:
        """The standardized weight in units of its row's scale, same shape as the weight x."""
        ratio: Tensor = self.standardize(x) / self._columns(self.scale, x)
        return ratio

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """The integer codes of ``weight``, int8, same shape."""
        return self.grid.round(self.ratio(weight)).to(torch.int8)

    @torch.no_grad()
    def cells(self, weight: Tensor) -> Tensor:
        """An integer for the cell of each weight: its code, unless codes themselves move."""
        return self.codes(weight)

    @torch.no_grad()
    def half_cell(self, weight: Tensor) -> Tensor:
        """Half the distance of evenly spaced levels, a number a row, for broadcasting."""
        return self._columns(self.uniform_grid.step / 2 * self.scale, weight)

    @torch.no_grad()
    def error(self, weight: Tensor) -> Tensor:
        """What rounding changes, w - Q(w) of the standardized weight: (rows, n), 0 where masked."""
        ratio, grid = self.ratio(weight).flatten(1), self.grid
        codes = grid.round(ratio)
        half = grid.half_cell(ratio - codes, codes)
        return residual_in_cell(ratio, None, grid)[0] * half * self.scale[:, None]

    @staticmethod
    def _columns(per_row: Tensor, weight: Tensor) -> Tensor:
        """A number a row, for broadcasting with the weight."""
        return per_row.view(-1, *[1] * (weight.dim() - 1))
