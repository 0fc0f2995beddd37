"""ONNX operators in the forward of a module that torch's exporter traces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

OPSET = 18


def onnx_operator(
    operator: str,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    shape: Iterable[Any],
    attributes: dict[str, Any] | None = None,
) -> Tensor:
    """Add one operator to the exported graph.

    Args:
        operator: its name, of the default domain in `OPSET`.
        inputs: what it reads.
        dtype: of its result.
        shape: of its result.
        attributes: its attributes.

    Returns:
        A stand-in for the result, with its type and shape and without its numbers.
    """
    result: Tensor = torch.onnx.ops.symbolic(
        operator, list(inputs), attributes or {}, dtype=dtype, shape=list(shape), version=OPSET
    )
    return result
