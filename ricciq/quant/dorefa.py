"""DoReFa: odd levels over the range of tanh(w) (Zhou et al. 2016, arXiv 1606.06160)."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from ricciq.quant.fake_quantize import MIN_SCALE
from ricciq.quant.grid import Bits, UniformGrid
from ricciq.quant.weight import WeightQuantizer


class DoReFaWeights(WeightQuantizer):
    """Weights at odd levels over the range of tanh(w) in the layer (eq. 9).

    At one bit there is no tanh, and the two levels are ± the mean of |w| (eq. 7). Nothing is
    clipped, so that no gradient is masked. All rows have one scale, which follows the weight.

    Args:
        rows: output channels.
        bits: 1 to 8 or ``"ternary"``.
        standardize: as for `WeightQuantizer`.
    """

    learns_scale = False

    def __init__(self, rows: int, bits: Bits, standardize: nn.Module | None = None) -> None:
        super().__init__(rows, bits, standardize)
        if bits != 1:
            self.standardize = nn.Sequential(self.standardize, nn.Tanh())

    @staticmethod
    def grid_of(bits: Bits) -> UniformGrid:
        """The odd codes of a width, without a mask beyond their ends."""
        return replace(UniformGrid.for_weights(bits, odd=True), clips=False)

    @property
    def layer_standardize(self) -> nn.Module:
        """What the layer itself does to its weight, without the tanh."""
        if self.bits == 1:
            return self.standardize
        return cast(nn.Sequential, self.standardize)[0]

    def set_bits(self, bits: Bits) -> None:
        """Refuse: whether there is a tanh depends on the width.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"DoReFa weights cannot change their width from {self.bits} to {bits}")

    def _fit(self, rows: Tensor, candidates: int) -> Tensor:  # noqa: ARG002
        """The scale at which the largest weight of the layer lies at the end of the grid."""
        return self._shared(rows).expand(len(rows), 1)

    def _follow(self, standardized: Tensor) -> None:
        scale = self._shared(standardized).clamp_min(MIN_SCALE)
        # Not in place: a layer that runs twice still needs the scales of before for its gradients.
        self.log_scale.data = scale.log().float().repeat(len(self.log_scale))

    def _shared(self, standardized: Tensor) -> Tensor:
        magnitude = standardized.detach().abs()
        return magnitude.mean() if self.bits == 1 else magnitude.max() / self.uniform_grid.high
