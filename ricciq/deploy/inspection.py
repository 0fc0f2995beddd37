"""The layers and bytes of an ONNX file, and which layers onnxruntime runs in integer kernels."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from ricciq.deploy.onnx_file import size_with_external_data
from ricciq.deploy.session import open_session, session_metadata
from ricciq.errors import ModelError, on_one_line
from ricciq.system.files import scratch_folder

WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger"}
_PER_BYTE_BITS = {8: 1, 4: 2, 2: 4, 1: 8}
_TERNARY_PER_BYTE = 5
_FLOAT_BITS = 32
"""The same value as in `ricciq.quant`, which cannot be imported without torch."""


@dataclass(frozen=True)
class LayerRow:
    """A convolution or matrix product whose weight is constant.

    Attributes:
        name: dotted name of the layer.
        operator: its ONNX operator.
        shape: of the weight.
        weight_bits: 1 to 8, ``"ternary"``, or 32 for float.
        act_bits: width of the input's codes, or 32 for float.
        bytes: size of the weight, scales and bias that only this layer uses.
        fused: whether onnxruntime runs it in an integer kernel.
    """

    name: str
    operator: str
    shape: list[int]
    weight_bits: int | str
    act_bits: int
    bytes: int
    fused: bool


@dataclass(frozen=True)
class Inspection:
    """Layers and totals of an ONNX file, and the operators that onnxruntime runs.

    Attributes:
        layers: in the order of the graph.
        file_bytes: with external data; the sum of the layers' bytes and the three below.
        shared_bytes: constants that several layers use, such as lookup tables for packed weights.
        other_bytes: constants that belong to no layer, such as scales of activations.
        graph_bytes: everything but constants: operators, names and metadata.
        runtime_operators: count of each operator in the graph that onnxruntime runs.
        metadata: what ricciq stored in the file; None if another tool wrote the file.
    """

    layers: list[LayerRow]
    file_bytes: int
    shared_bytes: int
    other_bytes: int
    graph_bytes: int
    runtime_operators: dict[str, int]
    metadata: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Rows and totals as plain values."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "totals": {
                "file bytes": self.file_bytes,
                "layer bytes": sum(layer.bytes for layer in self.layers),
                "shared bytes": self.shared_bytes,
                "other bytes": self.other_bytes,
                "graph bytes": self.graph_bytes,
                "layers": len(self.layers),
                "integer layers": sum(layer.fused for layer in self.layers),
                "integer convolutions, percent": self.fused_share(),
            },
            "runtime_operators": self.runtime_operators,
            "metadata": self.metadata,
        }

    def fused_share(self, operator: str = "Conv") -> float:
        """Percent of an operator's layers that run in integer kernels; 100 if there are none."""
        fused = [layer.fused for layer in self.layers if layer.operator == operator]
        return 100 * sum(fused) / len(fused) if fused else 100.0


def inspect_onnx(path: Path, scratch: Path | None = None) -> Inspection:
    """Read a file's layers, and load it in onnxruntime to see which of them are fused.

    Args:
        path: the ONNX file.
        scratch: folder for its unpacked weights, which are removed again; by default TMPDIR.

    Raises:
        ModelError: the file is missing, damaged or unsafe, or onnxruntime cannot load it.
        RicciqError: there is no room for the unpacked weights.
    """
    with scratch_folder(scratch) as unpacked:
        optimized_path = unpacked / "optimized.onnx"
        session = open_session(path, save_optimized=optimized_path)
        optimized = _load(optimized_path)
        runs = [(node.name or "", node.op_type) for node in optimized.graph]
    try:
        metadata = session_metadata(session, path)
    except ModelError:  # a file that another tool wrote is inspected, too
        metadata = None
    integer = {_original(name) for name, operator in runs if operator in INTEGER}
    model = _load(path)
    layers = [(node, found) for node in model.graph if (found := _layer_constants(node))]
    users = Counter(value for _, constants in layers for value in constants)
    rows = [
        _row(node, sum(_bytes(value) for value in constants if users[value] == 1), integer)
        for node, constants in layers
    ]
    own = sum(row.bytes for row in rows)
    shared = sum(_bytes(value) for value, count in users.items() if count > 1)
    total = sum(_bytes(value) for value in model.graph.initializers.values())
    file_bytes = size_with_external_data(path)
    operators = Counter(operator for _, operator in runs)
    return Inspection(
        layers=rows,
        file_bytes=file_bytes,
        shared_bytes=shared,
        other_bytes=total - own - shared,
        graph_bytes=file_bytes - total,
        runtime_operators=dict(sorted(operators.items())),
        metadata=metadata,
    )


def _load(path: Path) -> ir.Model:
    """A file's graph, with all constants as initializers."""
    try:
        model = ir.load(path)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    except Exception as error:  # protobuf and onnx_ir raise many types
        reason = on_one_line(error, 160)
        raise ModelError(
            f"{path} cannot be read as an ONNX file ({reason}); give an intact one"
        ) from None
    return model


def _original(name: str) -> str:
    """Name of the node that a fused one replaces; onnxruntime appends a number."""
    return re.sub(r"_token_\d+$", "", name)


def _bytes(constant: ir.Value) -> int:
    return constant.const_value.nbytes if constant.const_value is not None else 0


def _layer_constants(node: ir.Node) -> set[ir.Value]:
    """The constants that a layer uses; none if its weight is not constant."""
    if node.op_type not in WEIGHTED or len(node.inputs) < 2 or node.inputs[0] is None:
        return set()
    _, weight, *bias = node.inputs
    constants = _constants(weight)
    return constants.union(*map(_constants, bias)) if constants else constants


def _constants(value: ir.Value | None) -> set[ir.Value]:
    """The constants a value is computed from; none if it depends on the model's input."""
    found: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if value.const_value is not None:
            found.add(value)
        elif producer is None:
            return set()
        else:
            waiting.extend(producer.inputs)
    return found


def _row(node: ir.Node, own_bytes: int, integer: set[str]) -> LayerRow:
    data, weight = node.inputs[:2]
    assert data is not None
    assert weight is not None
    name = node.name or ""
    return LayerRow(
        name=name.removesuffix(f"/{node.op_type}"),
        operator=node.op_type,
        shape=_shape(weight),
        weight_bits=_weight_bits(_constants(weight)),
        act_bits=_act_bits(data),
        bytes=own_bytes,
        fused=name != "" and name in integer,
    )


def _weight_bits(constants: set[ir.Value]) -> int | str:
    looked_up = [c for c in constants if any(use.node.op_type == "Gather" for use in c.uses())]
    tables = [c.shape.dims for c in looked_up if c.shape and len(c.shape) == 2]
    widths = [width for rows, width in tables if rows == 256 and isinstance(width, int)]
    if widths == [_TERNARY_PER_BYTE]:
        return "ternary"
    if widths and _PER_BYTE_BITS.keys() >= set(widths):
        return sum(_PER_BYTE_BITS[width] for width in widths)
    codes = max(constants, key=lambda c: (math.prod(_shape(c)), c.dtype != ir.DataType.FLOAT))
    return int(codes.dtype.bitwidth) if codes.dtype is not None else _FLOAT_BITS


def _shape(value: ir.Value) -> list[int]:
    """The shape of a weight, found through the operators that unpack it."""
    while value.shape is None or not value.shape.is_static():
        producer = value.producer()
        if producer is None or not producer.inputs or producer.inputs[0] is None:
            return []
        if producer.op_type == "Reshape" and len(producer.inputs) == 2 and producer.inputs[1]:
            target = producer.inputs[1].const_value
            if target is not None and (target.numpy() > 0).all():
                return [int(n) for n in target.numpy()]
        value = producer.inputs[0]
    return list(value.shape.numpy())


def _act_bits(value: ir.Value) -> int:
    """Width of the codes that a DequantizeLinear reads, by the Clip before it."""
    dequantizing = value.producer()
    if dequantizing is None or dequantizing.op_type != "DequantizeLinear":
        return _FLOAT_BITS
    clip = dequantizing.inputs[0].producer() if dequantizing.inputs[0] else None
    if clip is not None and clip.op_type == "Clip" and len(clip.inputs) == 3:
        ends = [end.const_value for end in clip.inputs[1:] if end is not None]
        if all(end is not None and end.size == 1 for end in ends) and len(ends) == 2:
            low, high = (int(end.numpy().item()) for end in ends if end is not None)
            return (high - low).bit_length()
    return 8
