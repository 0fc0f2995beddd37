"""Constants that an exported file computes when it is loaded, such as weights from packed codes.

torch's exporter sees a buffer in place of each. Their operators are added to its graph: to trace
them would take longer than to trace the rest of the network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

SCOPES = "pkg.torch.onnx.name_scopes"
"""Key of a node's metadata where torch's exporter lists the modules that the node comes from."""


class Operators:
    """The part of an ONNX graph that computes an expression.

    Args:
        graph: where operators and constants are added.
        scope: name of the expression's module.
        module: the expression.
    """

    def __init__(self, graph: ir.Graph, scope: str, module: nn.Module) -> None:
        self._graph = graph
        self._scope = scope
        self._module = module
        self._tape = ir.tape.Tape(graph)

    def buffer(self, name: str) -> ir.Value:
        """Store a buffer of the module in the file, and return it.

        Args:
            name: of the buffer in the module.
        """
        short = self._scope.removesuffix("_quantizer")  # names can be larger than the weights
        stored = TorchTensor(self._module.get_buffer(name), f"{short}.{name}")
        return self._tape.initializer(stored)

    def integers(self, *numbers: int) -> ir.Value:
        """A vector of int64, which all expressions share.

        Args:
            numbers: its elements.
        """
        name = str(list(numbers))
        stored = self._graph.initializers.get(name)
        return stored or self._tape.initializer(ir.tensor(numbers, ir.DataType.INT64, name))

    def add(self, operator: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """Add an operator, and return its result.

        Args:
            operator: its name in ONNX.
            inputs: its inputs.
            attributes: its attributes.
        """
        scopes = {SCOPES: repr([self._scope, ""])}
        return self._tape.op(operator, inputs, attributes, metadata_props=scopes)


class Expression(nn.Module, ABC):
    """A constant tensor, and the ONNX operators that compute it.

    Args:
        shape: of the tensor.
        device: of the tensor.
    """

    placeholder: Tensor

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        super().__init__()
        one = torch.zeros((), device=device)  # all elements share its memory
        self.register_buffer("placeholder", one.expand(*shape), persistent=False)

    def forward(self) -> Tensor:
        """The tensor, or its placeholder while torch's exporter traces the model."""
        return self.placeholder if torch.onnx.is_in_onnx_export() else self.value()

    @abstractmethod
    def value(self) -> Tensor:
        """The tensor."""

    @abstractmethod
    def write(self, operators: Operators) -> ir.Value:
        """Add operators to a graph, and return their result: the tensor.

        Args:
            operators: where they are added.
        """


def replace_placeholders(graph: ir.Graph, model: nn.Module) -> None:
    """Put the operators of a model's expressions into the graph of the model.

    Args:
        graph: from torch's exporter; changed in place.
        model: what was exported.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Expression):
            continue
        placeholder = graph.initializers.pop(f"{name}.placeholder", None)
        if placeholder is not None:
            result = module.write(Operators(graph, name, module))
            result.type, result.shape = placeholder.type, placeholder.shape
            ir.convenience.replace_all_uses_with(placeholder, result)
    graph.sort()  # each operator to just before where its result is read first
