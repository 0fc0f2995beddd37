"""ONNX operators in the forward pass of a module that torch's exporter traces."""

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
        operator: the operator's name, of the default domain in `OPSET`.
        inputs: its inputs.
        dtype: the type of its result.
        shape: the shape of its result.
        attributes: its attributes.

    Returns:
        A placeholder for the result, with its type and shape but without values.
    """
    result: Tensor = torch.onnx.ops.symbolic(
        operator, list(inputs), attributes or {}, dtype=dtype, shape=list(shape), version=OPSET
    )
    return result
