"""The input of an exported file: normalized images or uint8 pixels, a fixed batch or any."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from ricciq.data.preprocessing import InputType, Preprocessing
from ricciq.deploy.session import LARGEST_BATCH, PIXEL_CHANNELS
from ricciq.errors import UsageError

_MOST_LOOKED_UP = 256
"""Numbers in an image that is normalized by a table; for larger ones, arithmetic is faster."""


def check_input(preprocessing: Preprocessing, input_type: InputType, batch: int | None) -> None:
    """Check that a file can take images in a form.

    Args:
        preprocessing: of the images.
        input_type: what the file takes.
        batch: images in a call; None for any number.

    Raises:
        UsageError: uint8 images with other than 1 or 3 channels, or a batch that is too large.
    """
    size = preprocessing.input_size
    if input_type == "uint8" and size[0] not in PIXEL_CHANNELS:
        raise UsageError(
            f"--input uint8 is for images of 1 or 3 channels, but the model takes {size[0]}; "
            "give --input float"
        )
    if batch is not None and not 0 < batch * math.prod(size) <= LARGEST_BATCH:
        raise UsageError(
            f"--batch {batch} is not a batch of images of {size}; give 1 to "
            f"{LARGEST_BATCH // math.prod(size)}"
        )


def take_pixels(graph: ir.Graph, preprocessing: Preprocessing) -> None:
    """Let a graph take (B, H, W, C) uint8 pixels in place of normalized (B, C, H, W) images.

    The result is what `Preprocessing.evaluation_transform` computes, bit for bit, in any format.

    Args:
        graph: tidy, with a single input; changed in place.
        preprocessing: of this input.
    """
    channels, height, width = preprocessing.input_size
    (normalized,) = graph.inputs
    assert normalized.shape is not None
    graph.inputs[0] = ir.Value(
        name=normalized.name,
        type=ir.TensorType(ir.DataType.UINT8),
        shape=ir.Shape([normalized.shape[0], height, width, channels]),
    )
    alike = len({*zip(preprocessing.mean, preprocessing.std, strict=True)}) == 1
    if alike and math.prod(preprocessing.input_size) <= _MOST_LOOKED_UP:
        _look_up(graph, normalized, preprocessing)
    else:
        _compute(graph, normalized, preprocessing)
    graph.sort()


def _compute(graph: ir.Graph, normalized: ir.Value, preprocessing: Preprocessing) -> None:
    """Normalize by the arithmetic of the transform.

    Constants are as long as a row of an image: onnxruntime takes a loop for each pixel if they are
    as long as a pixel. The transposition comes last, since onnxruntime then drops it together with
    the opposite one, which it needs in front of an integer convolution.
    """
    channels, _, width = preprocessing.input_size
    operators = _Operators(graph)
    add, constant = operators.add, operators.constant
    rows = add("Reshape", graph.inputs[0], constant("row", [0, 0, width * channels], np.int64))
    scaled = add("Div", add("Cast", rows, to=ir.DataType.FLOAT), constant("white", 255))
    centered = add("Sub", scaled, constant("mean", preprocessing.mean * width))
    divided = add("Div", centered, constant("std", preprocessing.std * width))
    images = add("Reshape", divided, constant("pixel", [0, 0, width, channels], np.int64))
    ir.convenience.replace_all_uses_with(normalized, operators.channels_first(images))


def _look_up(graph: ir.Graph, normalized: ir.Value, preprocessing: Preprocessing) -> None:
    """Normalize by a table of all pixels, and quantize by it too if that is all that follows.

    For small images, an operator takes longer to call than to run, and this needs fewer.
    """
    mean, std = np.float32(preprocessing.mean[0]), np.float32(preprocessing.std[0])
    table = (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std
    readers, replaced = normalized.consumers(), normalized
    if folded := [reader.op_type for reader in readers] == ["QuantizeLinear"]:
        scale, zero_point = (_number(value) for value in readers[0].inputs[1:])
        table = np.clip(np.rint(table / scale) + zero_point, 0, 255).astype(np.uint8)
        replaced = readers[0].outputs[0]
    operators = _Operators(graph)
    index = operators.add("Cast", graph.inputs[0], to=ir.DataType.INT32)
    stored = operators.constant("table", table, table.dtype.type)
    images = operators.channels_first(operators.add("Gather", stored, index, axis=0))
    ir.convenience.replace_all_uses_with(replaced, images)
    if folded:
        graph.remove(readers, safe=True)


def _number(value: ir.Value | None) -> np.ndarray[Any, Any]:
    """The only element of a constant."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


class _Operators:
    """Operators and constants in front of a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._tape = ir.tape.Tape(graph)

    def constant(self, name: str, values: object, kind: type = np.float32) -> ir.Value:
        return self._tape.initializer(ir.tensor(np.asarray(values, kind), name=f"input.{name}"))

    def add(self, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        name = f"input/{operator}.{len(self._tape.nodes)}"
        return self._tape.op(operator, inputs, attributes, name=name)

    def channels_first(self, images: ir.Value) -> ir.Value:
        return self.add("Transpose", images, perm=[0, 3, 1, 2])
