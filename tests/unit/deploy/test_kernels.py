"""The formulas of integer kernels, beside onnxruntime's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from kernels import check_same
from onnx import TensorProto, helper
from torch import Tensor

from ricciq.deploy.kernels import Codes, Sums, add, average, products, requantize
from ricciq.layers.conv import Convolution, Window

Arrays = dict[str, np.ndarray]
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def run(nodes: list[Any], given: Arrays, constants: Arrays) -> Tensor:
    """What onnxruntime computes; the last result is called y."""
    entries = [
        helper.make_tensor_value_info(name, TensorProto.UINT8, value.shape)
        for name, value in given.items()
    ]
    result = helper.make_tensor_value_info("y", TensorProto.UINT8, None)
    stored = [
        helper.make_tensor(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape, value.flatten()
        )
        for name, value in constants.items()
    ]
    graph = helper.make_graph(nodes, "graph", entries, [result], stored)
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = ort.InferenceSession(model.SerializeToString())
    return torch.from_numpy(session.run(None, given)[0]).float()


def node(kind: str, *inputs: str, to: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs, [to], **attributes)


def scale(random: np.random.Generator) -> np.ndarray:
    return np.asarray(random.uniform(0.01, 0.1), np.float32)


def codes(values: np.ndarray, size: np.ndarray, zero: np.ndarray) -> Codes:
    given = torch.from_numpy(values.astype(np.float32))
    return Codes(given, torch.tensor(size), torch.tensor(float(zero)))


@pytest.mark.parametrize("zeros", [(0, 0, 0), (7, 130, 200), (128, 0, 3), (255, 255, 255)])
@pytest.mark.parametrize("seed", range(5))
def test_sums(zeros: tuple[int, ...], seed: int) -> None:
    random = np.random.default_rng(seed)
    za, zb, zy = (np.asarray(zero, np.uint8) for zero in zeros)
    sa, sb, sy = (scale(random) for _ in range(3))
    a, b = (random.integers(0, 256, (2, 8, 61, 67)).astype(np.uint8) for _ in range(2))
    nodes = [
        node(DEQUANTIZE, "a", "sa", "za", to="x"),
        node(DEQUANTIZE, "b", "sb", "zb", to="z"),
        node("Add", "x", "z", to="sum"),
        node(QUANTIZE, "sum", "sy", "zy", to="y"),
    ]
    constants = {"sa": sa, "za": za, "sb": sb, "zb": zb, "sy": sy, "zy": zy}
    expected = run(nodes, {"a": a, "b": b}, constants)
    found = add(codes(a, sa, za), codes(b, sb, zb), torch.tensor(sy), torch.tensor(float(zy)))
    check_same(found, expected)


@pytest.mark.parametrize("zeros", [(0, 0), (7, 130), (128, 0)])
@pytest.mark.parametrize("side", [1, 2, 7, 14])
def test_averages(zeros: tuple[int, ...], side: int) -> None:
    random = np.random.default_rng(side)
    zx, zy = (np.asarray(zero, np.uint8) for zero in zeros)
    sx, sy = scale(random), scale(random)
    x = random.integers(0, 256, (16, 64, side, side + 1)).astype(np.uint8)
    nodes = [
        node(DEQUANTIZE, "given", "sx", "zx", to="x"),
        node("GlobalAveragePool", "x", to="mean"),
        node(QUANTIZE, "mean", "sy", "zy", to="y"),
    ]
    expected = run(nodes, {"given": x}, {"sx": sx, "zx": zx, "sy": sy, "zy": zy})
    found = average(codes(x, sx, zx), torch.tensor(sy), torch.tensor(float(zy)))
    check_same(found, expected)


@pytest.mark.parametrize("groups", [1, 4, 32])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("zeros", [(0, 0), (7, 130)])
def test_convolutions(groups: int, size: int, zeros: tuple[int, ...]) -> None:
    random = np.random.default_rng(groups + size)
    zx, zy = (np.asarray(zero, np.uint8) for zero in zeros)
    sx, sy = scale(random), 5 * scale(random)
    sw = random.uniform(0.001, 0.01, 32).astype(np.float32)
    x = random.integers(0, 256, (2, 32, 17, 19)).astype(np.uint8)
    # The largest exceed what float32 holds exactly.
    w = random.integers(-64, 65, (32, 32 // groups, size, size)).astype(np.int8)
    w[0] = 127
    b = random.integers(-(10**6), 10**6, 32).astype(np.int32)
    nodes = [
        node(DEQUANTIZE, "given", "sx", "zx", to="x"),
        node(DEQUANTIZE, "w", "sw", to="weight", axis=0),
        node(DEQUANTIZE, "b", "sb", to="bias", axis=0),
        node("Conv", "x", "weight", "bias", to="sums", pads=[size // 2] * 4, group=groups),
        node(QUANTIZE, "sums", "sy", "zy", to="y"),
    ]
    constants = {"sx": sx, "zx": zx, "w": w, "sw": sw, "b": b, "sb": sx * sw, "sy": sy, "zy": zy}
    expected = run(nodes, {"given": x}, constants)
    one = (1, 1)
    function = Convolution(Window((size, size), one, one, (size // 2,) * 4, False), groups)
    less_zero = torch.from_numpy(x.astype(np.float32)) - float(zx)
    found = products(function, less_zero, torch.from_numpy(w), 0)
    rows = [torch.from_numpy(value).view(-1, 1, 1) for value in (b, sx * sw)]
    sums = Sums(found + rows[0], rows[1])
    check_same(requantize(sums, torch.tensor(sy), torch.tensor(float(zy))), expected)


def test_products_are_exact_where_float32_is_not() -> None:
    weight = torch.full((1, 4000, 1, 1), 127, dtype=torch.int8)
    weight[0, 0] = 126
    window = Window((1, 1), (1, 1), (1, 1), (0,) * 4, False)
    given = torch.full((1, 4000, 1, 1), 255.0)
    found = products(Convolution(window, 1), given, weight, 0)
    assert found.item() == 255 * (127 * 4000 - 1) > 2**24
