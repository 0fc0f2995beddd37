"""Fake quantization with gradients: the straight-through estimator and learned scales.

Numbers become codes of a `Grid` times a scale. The gradient of that staircase is zero or infinite,
so training uses the straight-through estimator (STE, Bengio et al. 2013, arXiv 1308.3432) for the
numbers and the rule of learned step sizes (LSQ, Esser et al. 2020, arXiv 1902.08153) for the scale.
The scale's logarithm is stored, so that any optimizer keeps it positive.

All of it is elementwise, and large tensors take longer to fetch than to compute with. So a CPU gets
them in pieces that fit its cache; a compiler gets them whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ricciq.quant.grid import Grid, UniformGrid

MIN_SCALE = 2.0**-40
SLOPE_SAMPLES = 64
"""Entries of a slope's table from one code to the next."""
CACHED = 2**17
"""Numbers that each thread of a CPU processes at a time."""


class _FakeQuantize(torch.autograd.Function):
    """x -> scale * code, with STE for x and LSQ for the scale; only x is saved for the backward.

    The output is not saved, as the model may add to it in place. Nor is a mask: comparing and
    selecting take several times as long on a CPU as the arithmetic.
    """

    @staticmethod
    def forward(
        x: Tensor,
        log_scale: Tensor,
        zero_point: Tensor | None,
        grid: Grid,
        gain: float,
        clip_only: bool,
        slope: Tensor | None,
    ) -> Tensor:
        del gain, clip_only, slope
        x, scales = dense(x), positive(log_scale)
        if not is_in_pieces(x):
            return discretized(x, scales, zero_point, grid)
        result = torch.empty_like(x)
        for scale, part, rounded in pieces([scales], [x, result]):
            rounded.copy_(discretized(part, scale, zero_point, grid))
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        x, log_scale, zero_point, ctx.grid, ctx.gain, ctx.clip_only, slope = inputs
        ctx.save_for_backward(x, log_scale, zero_point, slope)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, log_scale, zero_point, slope = ctx.saved_tensors
        x, scales = dense(x), positive(log_scale)
        grad_x, per_scale = torch.empty_like(x), torch.zeros_like(scales)
        learned = ctx.needs_input_grad[1]
        parts = pieces([scales, per_scale], [x, grads[0], grad_x])
        for scale, total, part, part_grad, result in parts:
            numbers, grad = part.float(), part_grad.float()
            ratio = numbers / scale
            passed = masked(grad, ratio, zero_point, ctx.grid)
            if slope is None:
                result.copy_(passed)
            else:
                result.copy_(sloped(grad, ratio, zero_point, slope, ctx.grid))
            if not learned:
                continue
            codes = round_codes(ratio, zero_point, ctx.grid)
            if ctx.clip_only:  # PACT
                total.add_(_sum_like(scale, grad - passed, codes))
            else:
                # d(scale * code)/d(scale) is code - ratio inside, code at the ends (LSQ, eq. 3).
                within = _sum_like(scale, passed, numbers) / scale
                total.add_(_sum_like(scale, grad, codes) - within)
        # LSQ's gradient is that of the scale. Divided by it, an optimizer step of log(scale) makes
        # the same relative change, so published learning rates keep their meaning.
        gained = per_scale * ctx.gain / scales if learned else None
        return grad_x, gained, None, None, None, None, None


def dense(x: Tensor) -> Tensor:
    """The tensor without gaps in memory, in whatever order: channels last stays so."""
    return x if x.permute(_order(x)).is_contiguous() else x.contiguous()


def _order(x: Tensor) -> list[int]:
    """The dimensions in the order of memory, outermost first."""
    return sorted(range(x.dim()), key=x.stride, reverse=True)


def is_in_pieces(x: Tensor) -> bool:
    """Whether `pieces` may divide the tensor: it is on a CPU, and nothing is compiled."""
    return not torch.compiler.is_compiling() and x.is_cpu


def pieces(scales: Sequence[Tensor], numbers: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Matching parts of scales and numbers that fit a CPU's cache; other devices get them whole.

    Args:
        scales: tensors of one element, or of one for each row of the numbers; or none.
        numbers: tensors of one shape. The first and the last are dense and in the same order, so
            that parts of the last are views of it.

    Yields:
        A part of each scale, then of each of the numbers.
    """
    first = numbers[0]
    if not is_in_pieces(first):
        yield *scales, *numbers
        return
    held = CACHED * torch.get_num_threads()
    if not scales or scales[0].dim() == 0:
        order = _order(first)
        flat = [torch.split(x.permute(order).reshape(-1), held) for x in numbers]
        yield from ((*scales, *parts) for parts in zip(*flat, strict=True))
    else:
        rows = max(1, held // max(1, first[0].numel()))
        yield from zip(*(torch.split(x, rows) for x in (*scales, *numbers)), strict=True)


def sloped(
    grad: Tensor, ratio: Tensor, zero_point: Tensor | None, slope: Tensor, grid: UniformGrid
) -> Tensor:
    """The gradient times a tabulated slope.

    Args:
        grad: any shape.
        ratio: numbers in units of the scale, same shape.
        zero_point: the code of 0.0, or None for 0.
        slope: see `fake_quantize`.
        grid: the codes.

    Returns:
        The same shape.
    """
    first = -grid.low if zero_point is None else zero_point - grid.low
    fine = SLOPE_SAMPLES / grid.step
    position = torch.add(fine * (first + grid.step) + 0.5, ratio, alpha=fine)
    # Clamped as integers: a NaN becomes one outside too, where the slope is 0.
    index = position.to(torch.int32).clamp_(0, len(slope) - 1)
    if index.dim() == 1:  # pieces for a CPU, which looks up by 32 bits in a third of the time
        return slope.index_select(0, index).mul_(grad)
    return slope.take(index.long()).mul_(grad)


def _sum_like(scale: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Sums of a * b over the numbers of one scale, in float32."""
    if a.dim() == 1 and scale.dim() == 0:
        return torch.dot(a, b)  # without a product in memory
    return (a * b).sum_to_size(scale.shape)


def positive(log_scale: Tensor) -> Tensor:
    """exp, kept between 2**-40 and 2**40: a far too high learning rate must not end in NaN."""
    return log_scale.clamp(math.log(MIN_SCALE), -math.log(MIN_SCALE)).exp()


def discretized(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """The nearest numbers that codes stand for: ``scale * (code - zero_point)``.

    Args:
        x: any shape.
        scale: one number, or one for each row of x.
        zero_point: the code of 0.0, or None for 0.
        grid: the codes.

    Returns:
        The same shape and dtype as x.
    """
    # In float32, as are codes and scales under mixed precision.
    result = round_codes(x.float() / scale, zero_point, grid) * scale
    # torch 2.9 to 2.11 compile an autograd.Function that ends in an operator which returns one of
    # its arguments, as `copy_` and a `to` of the same dtype, to one whose gradients are 0.
    return result if result.dtype == x.dtype else result.to(x.dtype)


def round_codes(ratio: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """The nearest codes, less the zero point.

    Args:
        ratio: numbers in units of the scale; overwritten where there is a zero point, as memory
            costs more time than arithmetic.
        zero_point: the code of 0.0, or None for 0.
        grid: the codes, which are consecutive where there is a zero point.

    Returns:
        The same shape.
    """
    if zero_point is None:
        return grid.round(ratio)
    return ratio.round_().add_(zero_point).clamp_(grid.low, grid.high).sub_(zero_point)


def masked(grad: Tensor, ratio: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """The gradient within the grid's range, ends included, and 0 elsewhere.

    Args:
        grad: any shape.
        ratio: numbers in units of the scale, same shape.
        zero_point: the code of 0.0, or None for 0.
        grid: the codes.
    """
    return grid.mask(grad, ratio if zero_point is None else ratio + zero_point)


def fake_quantize(
    x: Tensor,
    log_scale: Tensor,
    grid: Grid,
    zero_point: Tensor | None = None,
    gain: float = 1.0,
    clip_only: bool = False,
    slope: Tensor | None = None,
) -> Tensor:
    """Round x to its grid: ``scale * (clamp(round(x / scale) + zero_point) - zero_point)``.

    Args:
        x: any shape.
        log_scale: natural logarithm of the scale, one number or (rows, 1, ...), one a row of x.
        grid: the codes, with the zero point added.
        zero_point: the code of 0.0, an integer in a floating-point tensor of one element.
        gain: factor on the scale's gradient; LSQ uses 1 / sqrt(elements per scale * highest code).
        clip_only: leave what lies within the range out of the scale's gradient, as PACT does.
        slope: what the gradient of x is multiplied by instead of 1 within the range and 0 outside,
            on a `UniformGrid` only: `SLOPE_SAMPLES` entries from one code to the next, from a
            code below the lowest to one above the highest; 0 at both ends and beyond.

    Returns:
        The same shape and dtype as x. Its gradient is the straight-through estimator's: passed
        unchanged where x lies within the grid's range, exactly zero outside.
    """
    result: Tensor = _FakeQuantize.apply(x, log_scale, zero_point, grid, gain, clip_only, slope)
    return result
