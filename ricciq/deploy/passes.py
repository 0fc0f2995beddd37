"""Passes over an exported ONNX graph: fold constants, move clips, name nodes, strip the rest."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from onnxscript.rewriter import RewriteRule, RewriteRuleSet
from onnxscript.rewriter.rules.common import successive_clip_relu_rule, successive_clip_rule

from ricciq.deploy.expressions import SCOPES

IR_VERSION = 10
"""The newest version that onnxruntime 1.20 reads."""

_LARGEST_SHARED = 2**16
_WEIGHT = ".weight_quantizer"
_CONSTANTS = (_WEIGHT, ".bias_quantizer")


def tidy(model: ir.Model, names: Mapping[str, str]) -> ir.Model:
    """Make an exported graph smaller, faster and more readable, in place.

    Constants are folded, but not the operators that unpack weights. A node is named after the
    module whose weight it uses, or else after the module it comes from.

    Args:
        model: the output of torch's exporter.
        names: for each name of a module, the name to use for it in the file.

    Returns:
        The same model.
    """
    optimizer.optimize_ir(
        model, should_fold=lambda node: False if _scope(node).endswith(_CONSTANTS) else None
    )
    _rules.apply_to_model(model)
    _pool_globally(model.graph)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass(size_limit=_LARGEST_SHARED)(model)
    passes.RemoveUnusedNodesPass()(model)
    used: dict[str, int] = {}
    scopes = {node: _scope(node) for node in model.graph}
    for node in model.graph:
        scope = _lender(node, scopes) or scopes[node]
        name = f"{names.get(scope, scope)}/{node.op_type}"
        used[name] = used.get(name, 0) + 1
        unpacks = scope.endswith(_CONSTANTS) and node.op_type != "DequantizeLinear"
        node.name = None if unpacks else name if used[name] == 1 else f"{name}.{used[name]}"
        node.metadata_props.clear()  # torch's metadata of nodes can be larger than the network
    # The same holds for names and shapes of values; runtimes infer the shapes.
    between = [
        value for node in model.graph for value in node.outputs if not value.is_graph_output()
    ]
    for number, value in enumerate(between):
        value.name = f"_{number}"
        value.type = value.shape = None
        value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.ir_version = IR_VERSION
    model.producer_name = "ricciq"
    return model


def _pool_globally(graph: ir.Graph) -> None:
    """Replace means over height and width, which runtimes have integer kernels for by this name."""
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2 or node.inputs[1] is None:
            continue
        image, axes = node.inputs[0], ir.convenience.get_const_tensor(node.inputs[1])
        if image is None or image.shape is None or image.shape.rank() != 4 or axes is None:
            continue
        if sorted(axis % 4 for axis in axes.numpy().tolist()) != [2, 3]:
            continue
        tape = ir.tape.Tape()
        scopes = dict(node.metadata_props)
        result = tape.op("GlobalAveragePool", [image], metadata_props=scopes)
        if node.attributes.get_int("keepdims", 1) == 0:
            axes_2_3 = tape.op("Constant", [], {"value": ir.tensor([2, 3])}, metadata_props=scopes)
            result = tape.op("Squeeze", [result, axes_2_3], metadata_props=scopes)
        result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], tape.nodes, node.outputs, [result]
        )


def _scope(node: ir.Node) -> str:
    """Name of the module that a node comes from, by torch's metadata."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "['', '']"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _lender(node: ir.Node, scopes: Mapping[ir.Node, str]) -> str | None:
    """Name of the module whose packed weight a node reads, transposed or not."""
    weight = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] else None
    if weight is not None and weight.op_type == "Transpose" and weight.inputs[0] is not None:
        weight = weight.inputs[0].producer()
    scope = "" if weight is None else scopes[weight]
    return scope.removesuffix(_WEIGHT) if scope.endswith(_WEIGHT) else None


def _clip_then_quantize(op: Any, x: Any, low: Any, high: Any, scale: Any, zero_point: Any) -> Any:
    return op.QuantizeLinear(op.Clip(x, low, high), scale, zero_point)


def _quantize_then_clip(
    op: Any, x: ir.Value, low: ir.Value, high: ir.Value, scale: ir.Value, zero_point: ir.Value
) -> Any:
    """Clip the codes, not the values. The result is the same, since rounding is monotone.

    With a float Clip between them, as of a ReLU6, onnxruntime does not fuse a convolution with its
    quantizer, and the convolution stays float.
    """
    codes = op.QuantizeLinear(x, scale, zero_point)
    codes.dtype, codes.shape = zero_point.dtype, x.shape  # the next rule needs them
    ends = [np.rint(_number(end) / _number(scale)) + _number(zero_point) for end in (low, high)]
    bounds = [ir.tensor(end.clip(0, 255).astype(np.uint8)) for end in ends]
    return op.Clip(codes, *(op.Constant(value=bound) for bound in bounds))


def _are_constants(context: Any, **values: ir.Value) -> bool:  # noqa: ARG001
    return all(ir.convenience.get_const_tensor(v) for k, v in values.items() if k != "x")


def _number(value: ir.Value) -> Any:
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return tensor.numpy()


def _gelu_of_torch(op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
    return op.Mul(x, op.Mul(half, op.Add(op.Erf(op.Div(x, root)), one)))


def _gelu_of_onnxruntime(
    op: Any, x: ir.Value, root: ir.Value, one: ir.Value, half: ir.Value
) -> Any:
    """The order that onnxruntime fuses to Gelu; the result is bit-identical: halving is exact."""
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)


_rules = RewriteRuleSet(
    [
        successive_clip_relu_rule,
        RewriteRule(_clip_then_quantize, _quantize_then_clip, _are_constants),
        successive_clip_rule,
        RewriteRule(_gelu_of_torch, _gelu_of_onnxruntime),
    ]
)
