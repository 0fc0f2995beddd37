"""Replace a model's layers by their discrete counterparts, according to a plan."""

from __future__ import annotations

from collections import Counter
from typing import cast

from torch import Tensor, nn

from ricciq.convert.plan import OUTPUT_BITS, Plan, plan_conversion
from ricciq.layers.base import QuantLayer, names_of
from ricciq.layers.fast_path import leave_fast_path
from ricciq.layers.hooks import quantize_input, quantize_output
from ricciq.layers.norm import BatchNorm, plain, rest_of
from ricciq.layers.registry import kind_of
from ricciq.networks import network_of
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.config import LSQ, QuantizerConfig
from ricciq.quant.grid import Bits


def _check_plan(plan: Plan, model: nn.Module, config: QuantizerConfig) -> None:
    """Refuse a plan, which may be read from a file, that does not fit the model."""
    modules = dict(model.named_modules())
    layers = {layer.name for layer in plan.layers}
    named = [*plan.points, *plan.points.values(), *(layer.parent for layer in plan.layers)]
    for name in named:
        if name is not None and name not in modules:
            raise ValueError(f"its plan has {name!r}, which is no Module of the model")
    sources: dict[str, int] = {}
    for layer in plan.layers:
        kind = kind_of(modules.get(layer.name), lent=layer.parent is not None)
        if kind is None:
            raise ValueError(f"its plan has {layer.name!r}, which is no layer that it can quantize")
        if layer.norm is not None and not isinstance(modules.get(layer.norm), kind.norms):
            raise ValueError(f"its plan has {layer.norm!r}, which is no BatchNorm of {layer.name}")
        if layer.input_of is not None and sources.get(layer.input_of) != layer.act_bits:
            raise ValueError(
                f"its plan has {layer.input_of!r}, whose input {layer.name} cannot use"
            )
        config.check(layer.weight_bits, layer.act_bits)
        sources[layer.name] = layer.act_bits
    if len(layers) < len(plan.layers):
        raise ValueError("its plan has a layer twice")


def convert(model: nn.Module, plan: Plan, config: QuantizerConfig = LSQ) -> nn.Module:
    """Replace the planned layers in place and add the 8-bit output quantizers.

    Args:
        model: the float model that the plan was made for; its parameters are used, not copied.
        plan: from `plan_conversion`.
        config: which quantizers the layers get; output quantizers always learn their scales.

    Returns:
        The same model, which must be calibrated before use.

    Raises:
        ValueError: the plan is of another model, or has a width that a quantizer does not have.
    """
    _check_plan(plan, model, config)
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        kind = kind_of(module, lent=layer.parent is not None)
        assert kind is not None
        norm = model.get_submodule(layer.norm) if layer.norm else None
        assert norm is None or isinstance(norm, BatchNorm)
        quantized = kind.from_float(
            module,
            layer.weight_bits,
            layer.act_bits,
            plain(norm),
            config,
            turn=owners[id(module.weight)] == 1,
        )
        if layer.input_of is not None:
            reader = cast(QuantLayer, model.get_submodule(layer.input_of))
            quantized.input_quantizer = reader.input_quantizer
        if layer.parent is not None and quantized.input_quantizer is not None:
            quantize_input(model.get_submodule(layer.parent), quantized.input_quantizer)
        for name in names_of(module, model):
            model.set_submodule(name, quantized)
        if layer.norm and norm is not None:
            model.set_submodule(layer.norm, rest_of(norm))
    leave_fast_path(model)
    device = next(model.parameters()).device
    quantizers: dict[str, ActivationQuantizer] = {}
    for name, source in plan.points.items():
        if source not in quantizers:
            quantizers[source] = LSQ.activation_quantizer(OUTPUT_BITS).to(device)
        quantize_output(model.get_submodule(name), quantizers[source])
    return model


def quantize(
    model: nn.Module,
    example: Tensor,
    weight_bits: Bits,
    act_bits: int,
    edge_bits: Bits = 8,
    config: QuantizerConfig = LSQ,
) -> Plan:
    """Make a float model's layers discrete, in place: `plan_conversion`, then `convert`.

    The model must then be calibrated.

    Args:
        model: the float model, any module that takes images; what `torch.compile` or
            `nn.DataParallel` returned for one is changed within.
        example: (B, C, H, W) input on the model's device.
        weight_bits: 1 to 8 or ``"ternary"``, or 32 to convert nothing.
        act_bits: 1 to 8, or 32 to leave activations float.
        edge_bits: width of weights and activations in the first and the last layer.
        config: which quantizers.

    Returns:
        The plan, which also lists what was kept float and why.

    Raises:
        ModelError: nothing in the model can be converted, its weights are not float32, or it does
            not take the example.
        ValueError: a quantizer has no such width.
    """
    model = network_of(model)
    plan = plan_conversion(model, example, weight_bits, act_bits, edge_bits)
    convert(model, plan, config)
    return plan


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The discrete layers of a converted model by dotted name, in the order of registration."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
