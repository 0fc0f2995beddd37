"""Quantizers of what modules take or return, between the discrete layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def quantize_output(module: nn.Module, quantizer: nn.Module) -> None:
    """Let everything ``module`` returns pass through ``quantizer``.

    A hook rather than a wrapper: the module keeps its class, its attributes and its place, so
    models that look into their blocks go on working.
    """
    module.add_module("output_quantizer", quantizer)
    module.register_forward_hook(_quantize_output)


def quantize_input(module: nn.Module, quantizer: nn.Module) -> None:
    """Let the first argument of ``module`` pass through ``quantizer``."""
    module.add_module("input_quantizer", quantizer)
    module.register_forward_pre_hook(_quantize_input)


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    point: Callable[[Tensor], Tensor] = module.input_quantizer  # type: ignore[assignment]
    return (point(args[0]), *args[1:])


def _quantize_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
    point: Callable[[Tensor], Tensor] = module.output_quantizer  # type: ignore[assignment]
    return point(output)
