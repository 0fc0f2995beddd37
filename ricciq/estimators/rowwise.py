"""Estimators that correct a gradient row by row."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ricciq.estimators.catalog import Block

CACHED = 2**16
"""Weights that a CPU corrects at a time. They fit its cache, which takes a third of the time."""


class Rowwise(ABC):
    """Base of the estimators that correct each row, or block of a row, by itself."""

    @abstractmethod
    def correct_rows(self, gradient: Tensor, xi: Tensor, kernel: int, progress: float) -> Tensor:
        """Correct rows without a mask.

        Args:
            gradient: (rows, n), float32 or float64.
            xi: coordinate, same shape and dtype.
            kernel: the block size that "kernel" means.
            progress: share of training that is done, from 0 to 1.

        Returns:
            Same shape and dtype.
        """

    @torch.no_grad()
    def correct(
        self,
        gradient: Tensor,
        xi: Tensor,
        kernel: int = 1,
        mask: Tensor | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Correct a gradient that was taken at discrete values.

        Args:
            gradient: (rows, n); of weights, a row per output channel.
            xi: coordinate, (rows, n), 0 where the gradient is masked.
            kernel: the block size that "kernel" means.
            mask: bool, (rows, n), True where the gradient is active; other entries take no part and
                are returned unchanged.
            progress: share of training that is done, from 0 to 1, for the schedule.

        Returns:
            (rows, n) in the gradient's dtype, computed in float32, or float64 if either input is.

        Raises:
            ValueError: shapes differ or are not (rows, n), or kernel is not positive.
        """
        g, x = as_rows(gradient, xi)
        if mask is not None:
            g, x = g.where(mask, 0), x.where(mask, 0)
        rows = len(g) if g.is_cuda else max(1, CACHED // max(1, g.shape[1]))
        pieces = zip(torch.split(g, rows), torch.split(x, rows), strict=True)
        corrected = torch.cat([self.correct_rows(*piece, kernel, progress) for piece in pieces])
        corrected = corrected.to(gradient.dtype)
        return corrected if mask is None else corrected.where(mask, gradient)


def as_rows(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape (rows, n) in float64 if one of them is, else in float32.

    Raises:
        ValueError: shapes differ or are not (rows, n).
    """
    shapes = [tuple(x.shape) for x in tensors]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"shapes are {shapes}; give tensors of one shape (rows, n).")
    wide = any(x.dtype == torch.float64 for x in tensors)
    return [x.to(torch.float64 if wide else torch.float32) for x in tensors]


def cut_into_blocks(x: Tensor, block: Block, kernel: int) -> list[Tensor]:
    """Cut rows into the blocks that share a metric.

    Args:
        x: (rows, n).
        block: "row", "kernel" or a number of neighbours.
        kernel: the block size that "kernel" means.

    Returns:
        The full blocks, (rows, blocks, size), and the shorter last ones, (rows, 1, rest), if any.

    Raises:
        ValueError: kernel is not positive.
    """
    if kernel < 1:
        raise ValueError(f"kernel is {kernel}; give an integer from 1.")
    n = x.shape[1]
    size = n if block == "row" else kernel if block == "kernel" else block
    rest = n % min(size, n)
    full = x[:, : n - rest].reshape(len(x), -1, min(size, n))
    return [full, x[:, n - rest :].unsqueeze(1)] if rest else [full]
