"""What inspection tells of a file: bytes that add up, widths of foreign files too, metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ricciq.deploy.export import add_metadata
from ricciq.deploy.inspection import INTEGER, WEIGHTED, Inspection, inspect_onnx
from ricciq.layers.registry import layer_kinds

WIDTHS = [(2, 2), (3, 4), (7, 2), (8, 4), ("ternary", 2), (4, 32), (32, 32)]


@pytest.mark.parametrize(("weight_bits", "act_bits"), WIDTHS)
def test_the_bytes_add_up_to_the_file(exported: Any, weight_bits: Any, act_bits: int) -> None:
    made = exported(weight_bits, act_bits)
    found: Inspection = made.inspection
    parts = (found.shared_bytes, found.other_bytes, found.graph_bytes)
    assert all(part >= 0 for part in parts)
    assert sum(row.bytes for row in found.layers) + sum(parts) == made.path.stat().st_size
    model = onnx.load(made.path)
    constants = sum(numpy_helper.to_array(t).nbytes for t in model.graph.initializer)
    assert found.graph_bytes == made.path.stat().st_size - constants
    totals = found.to_dict()["totals"]
    assert totals["file bytes"] == sum(
        totals[f"{part} bytes"] for part in ("layer", "shared", "other", "graph")
    )


def test_a_shared_table_counts_once_and_in_no_layer(exported: Any) -> None:
    found: Inspection = exported(2, 2).inspection
    low = [row for row in found.layers if row.weight_bits == 2]
    assert len(low) == 4
    tables = [256 * 4, 4 * 256 * 4]  # int8 entries, or int32 ones where rows are turned around
    assert found.shared_bytes >= min(tables)
    for row in low:
        rows, codes = row.shape[0], int(np.prod(row.shape))
        steps_and_signs = 4 * rows * 3  # scale, bias and, if rows are turned around, a sign
        assert row.bytes <= -(-codes // 4) + steps_and_signs + 64


def foreign(path: Path, kind: int, *, constant_nodes: bool) -> None:
    """A convolution of 8-bit weights the way other tools write it."""
    dtype = np.uint8 if kind == TensorProto.UINT8 else np.int8
    values = {
        "codes": np.ones((4, 1, 3, 3), dtype),
        "scale": np.full(4, 0.5, np.float32),
        "zero": np.zeros(4, dtype),
    }
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["w"], axis=0),
        helper.make_node("Conv", ["input", "w"], ["logits"], name="conv"),
    ]
    if constant_nodes:
        nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in tensors] + nodes
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ("n", 1, 8, 8))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [] if constant_nodes else tensors,
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.UINT8])
@pytest.mark.parametrize("constant_nodes", [False, True])
def test_a_file_of_another_tool(tmp_path: Path, kind: int, constant_nodes: bool) -> None:
    foreign(tmp_path / "foreign.onnx", kind, constant_nodes=constant_nodes)
    found = inspect_onnx(tmp_path / "foreign.onnx")
    (row,) = found.layers
    assert (row.name, row.weight_bits, row.act_bits, row.shape) == ("conv", 8, 32, [4, 1, 3, 3])
    assert row.bytes == 36 + 16 + 4
    assert found.metadata is None


# Metadata


def test_more_metadata_leave_the_graph_as_it_is(exported: Any, tmp_path: Path) -> None:
    original = exported(2, 2).path.read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(original)
    add_metadata(path, {"accuracy": {"top1": 97.5}})
    before, after = onnx.load_from_string(original), onnx.load(path)
    assert after.graph.SerializeToString() == before.graph.SerializeToString()
    (old,), (new,) = before.metadata_props, after.metadata_props
    assert json.loads(new.value) == {**json.loads(old.value), "accuracy": {"top1": 97.5}}
    del before.metadata_props[:], after.metadata_props[:]
    assert after.SerializeToString() == before.SerializeToString()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert inspect_onnx(path).to_dict()["metadata"]["accuracy"] == {"top1": 97.5}


def test_the_operators_of_every_kind_of_layer_are_known():
    # Named once more in the inspection, which must not import torch.
    for kind in layer_kinds():
        assert set(kind.operators) <= WEIGHTED, kind
        assert set(kind.kernels) <= INTEGER, kind
