"""The codes a quantizer may use, and where a number stands among them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Bits = int | Literal["ternary"]
"""A bit width from 1 to 8, ``"ternary"``, or 32 for float."""


LARGEST_CODE = 64
"""Largest code after stretching: two products with a uint8 add up to less than 2**15, the most that
x86 without VNNI can hold between instructions."""


def count_codes(bits: Bits) -> int:
    """How many codes a width can tell apart."""
    return 3 if bits == "ternary" else int(2**bits)


@dataclass(frozen=True)
class Grid:
    """The integer codes a quantizer may use: low, low + step, …, high.

    With step 1 a number goes to the nearest integer (half to even, as ONNX rounds); with step 2 the
    codes are odd, zero is a decision threshold and belongs to the cell above it.
    """

    low: int
    high: int
    step: int = 1
    clips: bool = True
    """Whether gradients are masked where a number lies beyond the ends."""
    just_outside: tuple[float, float] = field(init=False, repr=False, compare=False)
    """The float32 numbers next to the ends, below the lowest code and above the highest.

    Beside 0 it is the first normal one, as some devices take what is smaller for 0.
    """

    def __post_init__(self) -> None:
        """Work the neighbours out once, where no compiler is watching."""
        ends = torch.tensor([self.low, self.high], dtype=torch.float32)
        below, above = torch.nextafter(ends, ends.new_tensor([-math.inf, math.inf])).tolist()
        below = min(below, self.low - torch.finfo(torch.float32).tiny)
        object.__setattr__(self, "just_outside", (below, above))

    @classmethod
    def for_weights(cls, bits: Bits, odd: bool = False) -> Grid:
        """Signed codes: two's complement, but ±1 at one bit, no zero, and symmetric at 8 bits.

        Odd ones are symmetric and have no zero; at 8 bits, where int8 holds no more, all are taken.
        """
        if bits == "ternary":
            return cls(-1, 1)
        if bits == 1:
            return cls(-1, 1, step=2)
        if bits == 8:  # -128 has no opposite, and negative BatchNorm weights flip signs on export
            return cls(-127, 127)
        if odd:
            return cls(1 - 2**bits, 2**bits - 1, step=2)
        return cls(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    @property
    def has_zero(self) -> bool:
        """Whether 0 is one of the codes."""
        return self.step == 1

    @property
    def symmetric(self) -> bool:
        """Whether the opposite of every code is one."""
        return self.low == -self.high

    @property
    def codes(self) -> Tensor:
        """All of them, (size,), int64, increasing."""
        return torch.arange(self.low, self.high + 1, self.step)

    def round(self, ratio: Tensor) -> Tensor:
        """The nearest code of each ``x / scale``, as floating-point numbers of the same shape."""
        if self.step == 1:
            return ratio.round().clamp_(self.low, self.high)
        return (ratio / 2).floor_().mul_(2).add_(1).clamp_(self.low, self.high)

    def half_cell(self, error: Tensor, codes: Tensor) -> float:  # noqa: ARG002
        """Distance from a code to the decision threshold on the side of ``error``."""
        return self.step / 2

    def mask(self, grad: Tensor, ratio: Tensor) -> Tensor:
        """The gradient where ``ratio`` lies within the range, ends included, and 0 elsewhere."""
        if not self.clips:
            return grad
        masked: Tensor = torch.ops.aten.hardtanh_backward(grad.float(), ratio, *self.just_outside)
        return masked.to(grad.dtype)
