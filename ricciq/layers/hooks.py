"""Quantizers of the inputs and outputs of modules between the discrete layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def quantize_output(module: nn.Module, quantizer: nn.Module) -> None:
    """Quantize the output of a module.

    A hook rather than a wrapper: the module keeps its class, its attributes and its name, so that
    models that access their blocks still work.

    Args:
        module: returns one tensor.
        quantizer: applied to it.
    """
    module.add_module("output_quantizer", quantizer)
    module.register_forward_hook(_quantize_output)


def quantize_input(module: nn.Module, quantizer: nn.Module) -> None:
    """Quantize the first argument of a module.

    Args:
        module: takes a tensor first.
        quantizer: applied to it.
    """
    module.add_module("input_quantizer", quantizer)
    module.register_forward_pre_hook(_quantize_input)


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    quantizer: Callable[[Tensor], Tensor] = module.input_quantizer  # type: ignore[assignment]
    return (quantizer(args[0]), *args[1:])


def _quantize_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
    quantizer: Callable[[Tensor], Tensor] = module.output_quantizer  # type: ignore[assignment]
    return quantizer(output)
