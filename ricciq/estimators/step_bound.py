"""A bound on how far an optimizer step moves weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ricciq.quant.weight import WeightQuantizer


@dataclass(frozen=True)
class StepBound:
    """Bounds how far a weight moves in an optimizer step, in half quantization cells.

    A gradient taken at the discrete weights describes their own cells. A step across several cells,
    as at a high learning rate, goes beyond what it says (derived here).

    Attributes:
        half_cells: the longest move; None does not bound steps.
    """

    half_cells: float | None = None

    @contextmanager
    def around(self, weights: Iterable[tuple[str, Tensor, WeightQuantizer]]) -> Iterator[None]:
        """Bound the optimizer step that is taken inside the block.

        Weights of 8 bits are not bounded, since their cells are tiny. Nor are those that a layer
        standardizes, since the stored weight then has no cells.

        Args:
            weights: name, weight (rows, ...) and quantizer of each discrete weight.
        """
        bounded = [(weight, quantizer) for _, weight, quantizer in weights if quantizer.has_cells]
        if self.half_cells is None or not bounded:
            yield
            return
        before = [weight.detach().clone() for weight, _ in bounded]
        reaches = [self.half_cells * quantizer.half_cell(weight) for weight, quantizer in bounded]
        yield
        with torch.no_grad():
            for (weight, _), start, reach in zip(bounded, before, reaches, strict=True):
                weight.clamp_(start - reach, start + reach)
