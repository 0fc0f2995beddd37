"""The integer codes that a quantizer may use, and which of them a number is rounded to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Bits = int | Literal["ternary"]
"""A bit width from 1 to 8, ``"ternary"``, or `FLOAT_BITS`."""
FLOAT_BITS = 32
LARGEST_CODE = 64
"""Largest code after stretching: two products with a uint8 add up to less than 2**15, the most that
x86 without VNNI can hold between instructions."""


def count_codes(bits: Bits) -> int:
    """How many codes a width can tell apart."""
    return 3 if bits == "ternary" else int(2**bits)


class Grid(ABC):
    """The integer codes that a quantizer may use.

    A number is given as ``ratio``, its quotient by the scale, and is rounded to the nearest code.
    """

    low: int
    """The lowest code."""
    high: int
    """The highest code."""
    codes: Tensor
    """All codes, (size,), not decreasing."""

    @property
    @abstractmethod
    def is_consecutive(self) -> bool:
        """Whether every integer from the lowest code to the highest is a code."""

    @property
    def has_zero(self) -> bool:
        """Whether 0 is certain to be a code."""
        return self.is_consecutive

    @property
    def symmetric(self) -> bool:
        """Whether the opposite of every code is one."""
        codes = self.codes
        return torch.equal(codes, -codes.flip(0))

    @abstractmethod
    def round(self, ratio: Tensor) -> Tensor:
        """The nearest code of each ratio, as floating-point numbers of the same shape."""

    @abstractmethod
    def index(self, ratio: Tensor) -> Tensor:
        """The index of the nearest code in `codes`, int64, same shape."""

    @abstractmethod
    def half_cell(self, error: Tensor, codes: Tensor) -> Tensor | float:
        """Distance from a code to the threshold between it and the next one.

        Args:
            error: ratio minus code; its sign says on which side.
            codes: of the same shape.

        Returns:
            The same shape, or one number where all cells are equal.
        """

    @abstractmethod
    def mask(self, grad: Tensor, ratio: Tensor) -> Tensor:
        """The gradient where ``ratio`` lies within the range, ends included, and 0 elsewhere.

        Args:
            grad: any shape.
            ratio: the same shape.
        """


def _next_to(size: int) -> float:
    """From an integer that is not negative to the next larger float32."""
    return 2.0 ** (size.bit_length() - 24) if size else torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class UniformGrid(Grid):
    """Evenly spaced codes: low, low + step, …, high.

    With step 1 a number goes to the nearest integer (half to even, as ONNX rounds); with step 2 the
    codes are odd, zero is a decision threshold and belongs to the cell above it.

    Attributes:
        low: the lowest code.
        high: the highest code.
        step: distance between two codes, 1 or 2.
    """

    low: int
    high: int
    step: int = 1
    clips: bool = True
    """Whether gradients are masked where a number lies beyond the ends."""

    @property
    def just_outside(self) -> tuple[float, float]:
        """The float32 numbers next to the ends, below the lowest code and above the highest.

        Beside 0 it is the first normal one, as some devices take what is smaller for 0.
        """
        # Plain arithmetic: torch.compile evaluates it.
        return self.low - _next_to(-self.low), self.high + _next_to(self.high)

    @classmethod
    def for_weights(cls, bits: Bits, odd: bool = False) -> UniformGrid:
        """Signed codes: two's complement, but ±1 at one bit, no zero, and symmetric at 8 bits.

        Args:
            bits: 1 to 8 or ``"ternary"``.
            odd: symmetric codes without zero, such as -3, -1, 1, 3. At 8 bits int8 does not hold
                them and at ternary there are none: those widths are as without.
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
    def codes(self) -> Tensor:  # type: ignore[override]
        """All codes, (size,), int64, increasing."""
        return torch.arange(self.low, self.high + 1, self.step)

    @property
    def is_consecutive(self) -> bool:
        """See `Grid.is_consecutive`."""
        return self.step == 1

    def round(self, ratio: Tensor) -> Tensor:
        """See `Grid.round`."""
        if self.step == 1:
            return ratio.round().clamp_(self.low, self.high)
        return (ratio / 2).floor_().mul_(2).add_(1).clamp_(self.low, self.high)

    def index(self, ratio: Tensor) -> Tensor:
        """See `Grid.index`."""
        return self.round(ratio).long().sub_(self.low).floor_divide_(self.step)

    def half_cell(self, error: Tensor, codes: Tensor) -> float:  # noqa: ARG002
        """See `Grid.half_cell`: half a step."""
        return self.step / 2

    def mask(self, grad: Tensor, ratio: Tensor) -> Tensor:
        """See `Grid.mask`."""
        if not self.clips:
            return grad
        masked: Tensor = torch.ops.aten.hardtanh_backward(grad.float(), ratio, *self.just_outside)
        return masked.to(grad.dtype)
