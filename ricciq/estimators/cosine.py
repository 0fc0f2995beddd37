"""The cosine between two gradients that are known in parts."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Cosine:
    """Adds up the products that a cosine is made of."""

    def __init__(self) -> None:
        self._products = torch.zeros(3, dtype=torch.float64)

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add a part of both.

        Args:
            first: of one gradient, (rows, n) in float32 or float64.
            second: of the other, same shape.
        """
        of_a, of_b = (float(x.abs().amax()) or 1.0 for x in (first, second))
        a, b = first / of_a, second / of_b
        # Rows are added in float64: sums of millions in float32 are so far off that a cosine
        # exceeds 1. So are sizes multiplied: squares of small gradients are 0 in float32.
        rows = torch.stack([(x * y).sum(1) for x, y in ((a, b), (a, a), (b, b))])
        scales = torch.tensor([of_a * of_b, of_a**2, of_b**2], dtype=torch.float64)
        self._products += rows.double().sum(1).cpu() * scales

    @property
    def value(self) -> float:
        """The cosine of what was added; 0 where one of them is zero."""
        inner, *squares = self._products.tolist()
        norms = math.prod(map(math.sqrt, squares))
        return float(inner / norms) if norms else 0.0
