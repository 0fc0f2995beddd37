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
        # By rows: float32 sums of a million numbers are so far off that a cosine exceeds 1.
        pairs = (first, second), (first, first), (second, second)
        rows = torch.stack([(a * b).sum(1) for a, b in pairs])
        self._products += rows.double().sum(1).cpu()

    @property
    def value(self) -> float:
        """The cosine of what was added; 0 where one of them is zero."""
        inner, *squares = self._products.tolist()
        # The tiny floor is for gradients that are small without being zero.
        return float(inner / max(math.sqrt(math.prod(squares)), 1e-30))
