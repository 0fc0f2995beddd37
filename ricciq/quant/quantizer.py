"""What quantizers of weights and of activations have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ricciq.quant.fake_quantize import masked, positive, round_codes
from ricciq.quant.grid import Bits, Grid

Perturbation = Callable[[Tensor, Tensor | float], Tensor]
"""Changes what is rounded in training: see `ricciq.estimators.base.Perturbing`."""


class Quantizer(nn.Module):
    """Fake quantization with learned or calibrated scales.

    Attributes:
        bits: its width.
        log_scale: natural logarithm of the scales; it stays positive by any optimizer.
        zero_point: the code of 0.0, of activations.
        perturbation: changes what is rounded in training, or None.
    """

    learns_scale = True
    """Whether scales have gradients."""
    bits: Bits
    log_scale: nn.Parameter
    zero_point: Tensor | None
    perturbation: Perturbation | None = None

    @property
    def grid(self) -> Grid:
        """The codes, as they are now."""
        raise NotImplementedError

    @property
    def scale(self) -> Tensor:
        """The scales, positive, in the shape of ``log_scale``."""
        return positive(self.log_scale.detach())

    def set_bits(self, bits: Bits) -> None:
        """Change the width; the scales must then be found again.

        Raises:
            ValueError: the quantizer cannot, as ``can_change_width`` in its catalogue entry says.
        """
        raise NotImplementedError

    def ratio(self, x: Tensor) -> Tensor:
        """Numbers in units of their scale, same shape."""
        raise NotImplementedError

    @torch.no_grad()
    def residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The position of each number in its quantization cell.

        Args:
            x: a weight, (rows, ...), or activations, (B, ...), a row of which is an image's.

        Returns:
            (rows, n) residuals in [-1, 1], 0 at the level, ±1 at a decision threshold, and 0 where
            the straight-through estimator masks; and the (rows, n) mask, false there.
        """
        return residual_in_cell(self.ratio(x).flatten(1), self.zero_point, self.grid)


def perturbed(
    x: Tensor,
    log_scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    gain: float,
    perturb: Perturbation,
) -> Tensor:
    """Numbers after a perturbation, but not across an end of the range: what is masked stays so.

    Args:
        x: any shape.
        log_scale: as for `fake_quantize`, as are ``zero_point``, ``grid`` and ``gain``.
        zero_point: the code of 0.0, or None for 0.
        grid: the codes.
        gain: factor on the scale's gradient.
        perturb: the perturbation.

    Returns:
        The same shape. Gradients are those of x where it was.
    """
    with torch.no_grad():
        scale = positive(log_scale)
        ratio = x.float() / scale
        offset = 0 if zero_point is None else zero_point
        ends = [ratio.new_tensor(end) - offset for end in (grid.low, grid.high)]
        codes = round_codes(ratio.clone(), zero_point, grid)
        moved = perturb(ratio, 2 * grid.half_cell(ratio - codes, codes)).clamp(*ends)
        inside = masked(torch.ones_like(ratio), ratio, zero_point, grid)
        shift = (moved - ratio) * inside
    # The shift is constant in units of the scale. `fake_quantize` takes it for a part of x, and so
    # for a part of the scale's gradient; the term that is zero takes that back.
    given_back = (log_scale - log_scale.detach()) * (gain / scale)
    return x + (shift * (scale + given_back)).to(x.dtype)


def residual_in_cell(ratio: Tensor, zero_point: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """The position of each ratio in its cell: see `Quantizer.residual`.

    Args:
        ratio: numbers in units of their scale.
        zero_point: the code of 0.0, or None for 0.
        grid: the codes.
    """
    inside = masked(torch.ones_like(ratio), ratio, zero_point, grid).bool()
    codes = round_codes(ratio.clone(), zero_point, grid)
    from_level = ratio - codes
    return (from_level / grid.half_cell(from_level, codes)).clamp(-1, 1) * inside, inside
