"""What an ONNX file holds, layer by layer, and what the runtime made of it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ricciq.errors import ModelError
from ricciq.runtime import open_session

_WEIGHTED = {"Conv", "Gemm", "MatMul"}
_INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger"}
_PER_BYTE_BITS = {8: 1, 4: 2, 2: 4, 1: 8}
_TERNARY_PER_BYTE = 5


@dataclass(frozen=True)
class LayerRow:
    """A convolution or matrix product with constant weights.

    Attributes:
        name: the layer's name.
        operator: ONNX operator.
        shape: of the weight.
        weight_bits: 1 to 8, ``"ternary"``, or 32 for float.
        act_bits: width of the input's codes, or 32 for float.
        bytes: what the file spends on weight, steps and bias.
        fused: whether onnxruntime runs it in integers.
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
    """An ONNX file's layers and totals, and the operators onnxruntime runs."""

    layers: list[LayerRow]
    file_bytes: int
    runtime_operators: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Rows and totals as plain values."""
        packed = sum(layer.bytes for layer in self.layers)
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "totals": {
                "file bytes": self.file_bytes,
                "layer bytes": packed,
                "layers": len(self.layers),
                "integer layers": sum(layer.fused for layer in self.layers),
                "integer convolutions, percent": self.fused_share(),
            },
            "runtime_operators": self.runtime_operators,
        }

    def fused_share(self, operator: str = "Conv") -> float:
        """Percent of an operator's layers that run in integers; 100 where there is none."""
        fused = [layer.fused for layer in self.layers if layer.operator == operator]
        return 100 * sum(fused) / len(fused) if fused else 100.0


def inspect_onnx(path: Path) -> Inspection:
    """Read a file's layers, and load it to see which of them onnxruntime fuses.

    Raises:
        ModelError: the file is missing, damaged or refused by onnxruntime.
    """
    with tempfile.TemporaryDirectory() as scratch:
        optimized_path = Path(scratch) / "optimized.onnx"
        open_session(path, save_optimized=optimized_path)
        # What onnxruntime writes has external data for large models; both stay in the folder.
        optimized = _load(optimized_path)
        runs = [(node.name or "", node.op_type) for node in optimized.graph]
    integer = {_original(name) for name, operator in runs if operator in _INTEGER}
    operators: dict[str, int] = {}
    for _, operator in runs:
        operators[operator] = operators.get(operator, 0) + 1
    rows = list(_rows(_load(path), integer))
    return Inspection(rows, path.stat().st_size, dict(sorted(operators.items())))


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many kinds
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{path} is no readable ONNX file ({reason}); give an intact one"
        ) from None


def _original(name: str) -> str:
    """A fused node is named after the one it replaces, with a number behind."""
    return re.sub(r"_token_\d+$", "", name)


def _rows(model: ir.Model, integer: set[str]) -> Iterator[LayerRow]:
    for node in model.graph:
        if node.op_type not in _WEIGHTED or len(node.inputs) < 2:
            continue
        data, weight, *bias = node.inputs
        if weight is None or data is None or not (sources := _constants(weight)):
            continue
        constants = sources | {k: v for b in bias if b for k, v in (_constants(b) or {}).items()}
        bits = _weight_bits(sources)
        yield LayerRow(
            name=(node.name or "").removesuffix(f"/{node.op_type}"),
            operator=node.op_type,
            shape=_shape(weight),
            weight_bits=bits,
            act_bits=_act_bits(data),
            bytes=sum(
                value.const_value.nbytes for value in constants.values() if value.const_value
            ),
            fused=(node.name or "") in integer,
        )


def _constants(value: ir.Value) -> dict[str, ir.Value] | None:
    """The initializers a value is computed from, or None if an input of the model takes part."""
    if value.const_value is not None:
        return {value.name or "": value}
    producer = value.producer()
    if producer is None:
        return None
    found: dict[str, ir.Value] = {}
    for source in producer.inputs:
        if source is None:
            continue
        below = _constants(source)
        if below is None:
            return None
        found |= below
    return found


def _weight_bits(sources: dict[str, ir.Value]) -> int | str:
    tables = [v for v in sources.values() if v.shape is not None and v.shape[0:1] == (256,)]
    tables = [v for v in tables if len(v.shape or ()) == 2 and v.dtype != ir.DataType.FLOAT]
    packed = any(v.dtype == ir.DataType.UINT8 for v in sources.values())
    if packed and tables:
        widths = [v.shape.numpy()[1] for v in tables if v.shape is not None]
        if widths == [_TERNARY_PER_BYTE]:
            return "ternary"
        return sum(_PER_BYTE_BITS[width] for width in widths)
    return 8 if any(v.dtype == ir.DataType.INT8 for v in sources.values()) else 32


def _shape(value: ir.Value) -> list[int]:
    """The shape of a weight, through the operators that unpack it."""
    if value.shape is not None:
        return list(value.shape.numpy())
    producer = value.producer()
    return _shape(producer.inputs[0]) if producer and producer.inputs[0] else []


def _act_bits(value: ir.Value) -> int:
    producer = value.producer()
    if producer is None or producer.op_type != "DequantizeLinear" or producer.inputs[0] is None:
        return 32
    codes = producer.inputs[0].producer()
    if codes is None or codes.op_type != "Clip":
        return 8
    highest = codes.inputs[2]
    if highest is None or highest.const_value is None:
        return 8
    return int(highest.const_value.numpy()).bit_length()
