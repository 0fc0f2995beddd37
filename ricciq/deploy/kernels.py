"""What onnxruntime's integer kernels compute, to the last bit.

Codes and sums are integers in floating-point tensors. Scales are multiplied in float32, in the
order of the kernels; what they fuse is computed in float64 and rounded once. Found by comparing the
kernels with such formulas over millions of codes (onnxruntime 1.20 to 1.32 on x86).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ricciq.layers.base import Function

_LARGEST_EXACT = 2**24
"""float32 holds all integers up to here, and so is every sum of products below it exact."""
_LOW_BITS = 16


class Codes(NamedTuple):
    """Quantized numbers, ``scale * (values - zero_point)``.

    Attributes:
        values: 0 to 255.
        scale: float32, one number.
        zero_point: 0 to 255, one number.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """QuantizeLinear.

    Args:
        x: numbers.
        scale: float32, one number.
        zero_point: the code of zero.

    Returns:
        Codes from 0 to 255, same shape.
    """
    return ((x / scale).round() + zero_point).clamp(0, 255)


class Sums(NamedTuple):
    """Sums of products of codes, ``scale * values`` as numbers.

    Attributes:
        values: int32.
        scale: float32, for broadcasting with the values.
    """

    values: Tensor
    scale: Tensor


def products(function: Function, given: Tensor, weight: Tensor, axis: int) -> Tensor:
    """A layer's function of integers without a bias, exactly.

    Args:
        function: of the layer.
        given: codes less their zero point, -255 to 255.
        weight: codes.
        axis: of the rows in the weight.

    Returns:
        int32, in the shape of the layer's output.
    """
    rows = weight.float().movedim(axis, 0).flatten(1)
    largest = 255 * float(rows.abs().sum(1).max())
    nothing = torch.zeros(len(rows), device=given.device)
    if given.is_cuda:  # whose convolutions may round their operands, or transform them
        found = function(given.double(), weight.double(), nothing.double())
    elif largest < _LARGEST_EXACT:
        found = function(given, weight.float(), nothing)
    else:
        high = (weight.float() / _LOW_BITS).round()
        low = weight.float() - _LOW_BITS * high
        found = function(given, high, nothing).double() * _LOW_BITS
        found += function(given, low, nothing)
    return found.to(torch.int32)


def requantize(sums: Sums, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The end of QLinearConv.

    Args:
        sums: of products and the bias.
        scale: of the output.
        zero_point: of the output.

    Returns:
        Codes from 0 to 255, same shape.
    """
    return ((sums.values.float() * (sums.scale / scale)).round() + zero_point).clamp(0, 255)


def add(first: Codes, second: Codes, scale: Tensor, zero_point: Tensor) -> Tensor:
    """QLinearAdd.

    Args:
        first: the first operand; their order matters to the last bit.
        second: the second operand.
        scale: of the sum.
        zero_point: of the sum.

    Returns:
        Codes from 0 to 255, same shape.
    """
    one, other = first.scale / scale, second.scale / scale
    zeros = _fused(first.zero_point, one, other * second.zero_point)
    found = _fused(second.values, other, zero_point - zeros)
    return _fused(first.values, one, found).round().clamp(0, 255)


def average(given: Codes, scale: Tensor, zero_point: Tensor) -> Tensor:
    """QLinearGlobalAveragePool.

    Args:
        given: (B, C, H, W).
        scale: of the averages.
        zero_point: of the averages.

    Returns:
        (B, C, 1, 1) codes from 0 to 255.
    """
    count = given.values.shape[2:].numel()
    sums = (given.values - given.zero_point).double().sum((2, 3), keepdim=True)
    return requantize(Sums(sums, given.scale), scale * count, zero_point)


def _fused(x: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """A fused multiply-add of float32 numbers."""
    return (x.double() * factor.double() + shift.double()).float()
