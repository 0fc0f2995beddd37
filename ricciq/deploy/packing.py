"""Packing of codes into bytes: the smallest storage of low-bit weights that lookup tables unpack.

A width that divides 8 packs into one plane of bytes. Other widths are split into bit planes of 4, 2
and 1 bits, which are packed separately. Five ternary codes make a byte (3**5 = 243). Unpacking is a
table lookup for each plane and a sum, which onnxruntime folds to int8 weights when it loads a file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ricciq.quant.grid import Bits, Grid, UniformGrid, count_codes

_PLANE_WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


@dataclass(frozen=True)
class Plane:
    """A part of every code, which is ``table[data]``, flattened.

    Attributes:
        data: (bytes,) uint8.
        table: (256, codes per byte) int32, the parts that each possible byte holds.
    """

    data: Tensor
    table: Tensor


def _plane(indices: Tensor, base: int, parts: Tensor) -> Plane:
    """Pack digits 0 … base - 1, the first one lowest; ``parts[d]`` is the value of digit d."""
    per_byte = next(n for n in range(8, 0, -1) if base**n <= 256)
    powers = torch.tensor([base**i for i in range(per_byte)])
    padding = -len(indices) % per_byte
    digits = torch.nn.functional.pad(indices.long(), (0, padding)).view(-1, per_byte)
    data = (digits * powers).sum(1).to(torch.uint8)
    table = parts[(torch.arange(256)[:, None] // powers) % base]
    return Plane(data, table.to(torch.int32))


def pack(codes: Tensor, bits: Bits, grid: Grid | None = None) -> list[Plane]:
    """Pack integer codes of a grid.

    Args:
        codes: any shape, integers on the grid.
        bits: 1 to 8 or ``"ternary"``; 3, 5, 6 and 7 are for evenly spaced codes.
        grid: at most as many codes as bits can tell apart; by default those of two's complement.

    Returns:
        The planes, whose unpacked parts add up to the codes.

    Raises:
        ValueError: a code is not on the grid, or the grid's codes are not evenly spaced at a width
            that takes several planes.
    """
    grid = grid or UniformGrid.for_weights(bits)
    every = grid.codes.to(codes.device)
    if not torch.equal(codes, codes.round()):
        raise ValueError("codes that are not integers cannot be packed")
    indices = torch.searchsorted(every, codes.flatten().to(every.dtype)).clamp(max=len(every) - 1)
    if len(every) > count_codes(bits) or not torch.equal(every[indices], codes.flatten().to(every)):
        raise ValueError(f"codes outside the grid {grid} cannot be packed at {bits} bits")
    if bits == "ternary" or len(_PLANE_WIDTHS[bits]) == 1:
        base = count_codes(bits)
        parts = torch.nn.functional.pad(every.long(), (0, base - len(every)))
        return [_plane(indices, base, parts)]
    steps = set(every.diff().tolist())
    if len(steps) != 1:
        raise ValueError(f"codes that are not evenly spaced cannot be packed at {bits} bits")
    (step,) = map(int, steps)
    planes = []
    shift = 0
    for width in _PLANE_WIDTHS[bits]:
        parts = torch.arange(2**width) * 2**shift * step + (grid.low if shift == 0 else 0)
        planes.append(_plane((indices >> shift) & (2**width - 1), 2**width, parts))
        shift += width
    return planes


def unpack(planes: list[Plane], count: int) -> Tensor:
    """The first ``count`` codes that were packed, int32, (count,).

    Args:
        planes: from `pack`.
        count: how many codes; the last byte may hold more.
    """
    parts = [plane.table[plane.data.long()].flatten()[:count] for plane in planes]
    return torch.stack(parts).sum(0, dtype=torch.int32)
