"""What quantizers of weights and of activations have in common: their kinds, and cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ricciq.quant.codebook import Codebook
from ricciq.quant.fake_quantize import (
    masked,
    positive,
    round_codes,
)
from ricciq.quant.grid import Bits, Grid

WeightKind = Literal["lsq", "odd", "dorefa", "fixed", "codebook"]
ActKind = Literal["lsq", "pact", "fixed"]


@dataclass(frozen=True)
class Kinds:
    """Which quantizers a network uses.

    Attributes:
        weights: "lsq" learns a step a row (Esser et al. 2020, arXiv 1902.08153); "odd" does, with
            levels -3, -1, 1, 3 and so on below 8 bits; "dorefa" spreads odd levels over the range
            of tanh(w) in the layer (Zhou et al. 2016, arXiv 1606.06160, eq. 9; at one bit, eq. 7,
            its two levels are the mean |w|); "fixed" keeps the steps that calibration found;
            "codebook" learns a step a row and the codes of the layer, at 1, 2 or 4 bits or ternary.
        activations: "lsq"; "pact" learns the clipping point from what is clipped alone (Choi et al.
            2018, arXiv 1805.06085, eq. 3), with LSQ's gain and without a decay of its own; "fixed".
        normalize: whether each row of a weight keeps, before it is rounded, the norm it had.
        search: how many first steps are tried; 1 takes that which clips nothing.
    """

    weights: WeightKind = "lsq"
    activations: ActKind = "lsq"
    normalize: bool = False
    search: int = 100


LSQ = Kinds()
Place = Callable[[Tensor, Tensor | float], Tensor]
"""What is rounded in the place of numbers: see `ricciq.estimators.base.Displacing`."""
FLOAT_BITS = 32
CODEBOOK_WIDTHS: tuple[Bits, ...] = (1, 2, 4, "ternary")
"""Those whose codes one lookup table undoes: `ricciq.deploy.packing` splits the others."""


def displaced(
    x: Tensor,
    log_scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid | Codebook,
    gain: float,
    place: Place,
) -> Tensor:
    """Moved to its place, but not across an end of the range: what is masked stays so."""
    with torch.no_grad():
        scale = positive(log_scale)
        ratio = x.float() / scale
        offset = 0 if zero_point is None else zero_point
        ends = [ratio.new_tensor(end) - offset for end in (grid.low, grid.high)]
        codes = round_codes(ratio.clone(), zero_point, grid)
        placed = place(ratio, 2 * grid.half_cell(ratio - codes, codes)).clamp(*ends)
        inside = masked(torch.ones_like(ratio), ratio, zero_point, grid)
        shift = (placed - ratio) * inside
    # The shift is constant in steps: what `fake_quantize` takes for a part of x, and with it for a
    # part of the step's gradient, is taken back by the term that is zero.
    given_back = (log_scale - log_scale.detach()) * (gain / scale)
    return x + (shift * (scale + given_back)).to(x.dtype)


def residual_in_cell(
    ratio: Tensor, zero_point: Tensor | None, grid: Grid | Codebook
) -> tuple[Tensor, Tensor]:
    """Where each ratio stands in its cell, from -1 to 1 and 0 where masked; and where it is not."""
    inside = masked(torch.ones_like(ratio), ratio, zero_point, grid).bool()
    codes = round_codes(ratio.clone(), zero_point, grid)
    from_level = ratio - codes
    return (from_level / grid.half_cell(from_level, codes)).clamp(-1, 1) * inside, inside
