"""The plan of a conversion: widths of layers, 8-bit outputs between them, and what stays float."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal, cast

from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ricciq.convert.trace import Call, Recording, Value, record, value_of
from ricciq.errors import ModelError
from ricciq.layers.base import QuantLayer
from ricciq.layers.registry import HOOKED, has_hooks, kind_of, norm_classes, why_not
from ricciq.quant.grid import FLOAT_BITS, Bits

ADDITIONS = {"add", "__add__", "__radd__", "__iadd__", "add_"}
_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}
_POOLING = {"mean", "adaptive_avg_pool2d", "AdaptiveAvgPool2d", "avg_pool2d", "AvgPool2d"}
_WEIGHTED_CALLS = {"conv1d", "conv2d", "conv3d", "linear"}
_RECTIFIERS = {"ReLU", "relu", "relu_", "ReLU6", "relu6", "Hardtanh", "hardtanh", "hardtanh_"}
"""What the runtime fuses into a convolution's kernel, or the exporter into a quantizer's range."""
OUTPUT_BITS = 8
"""Width of the output quantizers at additions and behind convolutions without another quantizer."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer to convert.

    Attributes:
        name: its dotted name in the model.
        weight_bits: 1 to 8 or ternary.
        act_bits: 1 to 8, or 32 for float activations.
        norm: the dotted name of the BatchNorm that it takes in, if any.
        parent: the module that uses the layer's weight directly instead of calling the layer.
        input_of: an earlier layer that reads the same tensor, and whose input quantizer it uses.
    """

    name: str
    # Checked when a plan is read from a file; the dataclass itself does not check.
    weight_bits: Annotated[int, Field(ge=1, le=8)] | Literal["ternary"]
    act_bits: Annotated[int, Field(ge=1, le=FLOAT_BITS)]
    norm: str | None
    parent: str | None = None
    input_of: str | None = None


@dataclass(frozen=True)
class Kept:
    """Something that stays float.

    Attributes:
        name: its dotted name in the model, or the function it is.
        kind: of module or function.
        why: the reason, for people.
    """

    name: str
    kind: str
    why: str


@dataclass(frozen=True)
class Plan:
    """What a conversion does to a model.

    Attributes:
        layers: the layers to convert, in the order they run.
        points: names of the modules with an 8-bit output quantizer, mapped to the module whose
            quantizer they use: their own, or that of one whose values they only select from.
        kept: what stays float.
    """

    layers: list[LayerPlan]
    points: dict[str, str]
    kept: list[Kept]


def plan_conversion(
    model: nn.Module,
    example: Tensor,
    weight_bits: Bits,
    act_bits: int,
    edge_bits: Bits = 8,
) -> Plan:
    """Decide what becomes discrete, from one recorded forward pass.

    Args:
        model: the float model.
        example: (B, C, H, W) input on the model's device.
        weight_bits: 1 to 8 or ``"ternary"``, or 32 to convert nothing.
        act_bits: 1 to 8, or 32 to leave activations float.
        edge_bits: width of weights and activations in the first and the last layer.

    Raises:
        ModelError: nothing in the model can be converted.
    """
    if weight_bits == FLOAT_BITS:
        return Plan(
            [], {}, [Kept("", type(model).__name__, "32 bits: the whole model stays float")]
        )
    recording = record(model, example)
    modules = dict(model.named_modules())
    if any(isinstance(module, QuantLayer) for module in modules.values()):
        raise ModelError(
            f"the model {type(model).__name__} is quantized already; give the float model"
        )
    lent = _lent_weights(recording, modules)
    layer_of = {
        call: name
        for call in recording.calls
        if (name := lent.get(call) or _called_layer(call, recording, modules))
    }
    names = list(dict.fromkeys(layer_of.values()))
    if not names:
        first = next(_kept_modules([], recording, modules), None)
        reason = "" if first is None else f" ({': '.join(filter(None, (first.name, first.why)))})"
        raise ModelError(
            f"the model {type(model).__name__} has no convolution or linear layer that can be "
            f"converted{reason}; choose another model"
        )
    norms = _norms_behind(list(layer_of), recording, modules)
    layers = []
    floats: list[Kept] = []
    for name in names:
        at_edge = name in (names[0], names[-1])
        # The first and last layers are most sensitive and small: 8 bits there is the convention.
        inputs = act_bits if act_bits == FLOAT_BITS or not at_edge else int(_widest(edge_bits))
        parent = next((call.name for call, layer in lent.items() if layer == name), None)
        if parent is not None and not _alone_reads_argument(parent, lent, recording):
            floats.append(Kept(name, "input", f"{parent} reads its argument elsewhere, too"))
            inputs = FLOAT_BITS
        layers.append(
            LayerPlan(name, edge_bits if at_edge else weight_bits, inputs, norms.get(name), parent)
        )
    layers = list(_with_shared_inputs(layers, layer_of, recording))
    points: dict[str, str] = {}
    if act_bits != FLOAT_BITS:
        points, unquantized = _output_quantizers(layers, recording, modules)
        floats += unquantized
    for name in names:
        kind = kind_of(modules[name])
        if kind is not None and kind.float_kernel is not None:
            floats.append(Kept(name, "kernel", kind.float_kernel))
    kept = [
        *_kept_modules(layers, recording, modules),
        *_kept_products(recording, modules, lent),
        *floats,
    ]
    return Plan(layers, points, kept)


def _widest(bits: Bits) -> int:
    return 2 if bits == "ternary" else bits


def _called_layer(call: Call, recording: Recording, modules: dict[str, nn.Module]) -> str | None:
    """The layer that a call runs, if it can be converted and its input depends on the image."""
    constant = recording.constants.issuperset(call.inputs)
    if not call.is_module or constant or _why_not(call.name, recording, modules):
        return None
    return call.name


def _why_not(name: str, recording: Recording, modules: dict[str, nn.Module]) -> str | None:
    """Why a module has no discrete counterpart in this model, or None if it has one."""
    module = modules[name]
    kind = kind_of(module)
    if kind is None:
        return why_not(module)
    if not name:
        return "it is the whole model; put it into nn.Sequential to quantize it"
    if name in recording.with_options:
        return "it is called with more than its input, or with that by name"
    if name.endswith("._orig_mod"):
        return "torch.compile holds on to it; give the model as it was before"
    if kind.copies_weight:
        others = (m for m in modules.values() if m is not module)
        if any(p is module.weight for m in others for p in m.parameters(recurse=False)):
            return "another module has its weight, too"
    return why_not(module)


def _lent_weights(recording: Recording, modules: dict[str, nn.Module]) -> dict[Call, str]:
    """Calls of a function on the weight of a layer that never runs, mapped to the layer's name."""
    weights = {
        (kind.lent_to, value_of(cast(Tensor, module.weight))): name
        for name, module in modules.items()
        if (kind := kind_of(module, lent=True)) and not recording.times[name]
    }
    lent = {}
    for call in recording.calls:
        if call.is_module or recording.times[call.name] != 1:
            continue
        for value in call.inputs:
            if (call.kind, value) in weights:
                lent[call] = weights[call.kind, value]
    return lent


def _alone_reads_argument(parent: str, lent: dict[Call, str], recording: Recording) -> bool:
    """Whether a module uses its first argument with lent weights only."""
    value = recording.first_argument.get(parent)
    readers = recording.readers[value] if value is not None else []
    return bool(readers) and all(reader in lent and reader.name == parent for reader in readers)


def _with_shared_inputs(
    layers: list[LayerPlan], layer_of: dict[Call, str], recording: Recording
) -> Iterator[LayerPlan]:
    """Layers of which those that read the same tensor at the same width share a quantizer.

    The runtime then quantizes the tensor once, and an addition that it comes from ends in integers.
    """
    read = {name: call.inputs[0] for call, name in layer_of.items() if recording.times[name] == 1}
    first: dict[tuple[Value, int], str] = {}
    for layer in layers:
        source = layer.name
        if layer.name in read and layer.act_bits != FLOAT_BITS:
            source = first.setdefault((read[layer.name], layer.act_bits), layer.name)
        yield layer if source == layer.name else replace(layer, input_of=source)


def _norms_behind(
    calls: list[Call], recording: Recording, modules: dict[str, nn.Module]
) -> dict[str, str]:
    """The BatchNorm that each layer can take in: the only reader of the layer's output."""
    norms = {}
    for call in calls:
        readers = recording.readers[call.outputs[0]]
        if len(readers) != 1 or call.outputs[0] in recording.result:
            continue
        norm = modules[readers[0].name]  # timm's BatchNormAct2d calls the function from its forward
        if readers[0].kind not in (type(norm).__name__, "batch_norm"):
            continue
        once = recording.times[call.name] == recording.times[readers[0].name] == 1
        kind = kind_of(modules[call.name])
        foldable = kind and type(norm) in kind.norms and _has_statistics(norm)
        if once and foldable and not has_hooks(norm):
            norms[call.name] = readers[0].name
    return norms


def _has_statistics(norm: nn.Module) -> bool:
    return getattr(norm, "running_mean", None) is not None


def _output_quantizers(
    layers: list[LayerPlan], recording: Recording, modules: dict[str, nn.Module]
) -> tuple[dict[str, str], list[Kept]]:
    """The outputs that must be quantized for the runtime to compute in integers.

    A convolution runs in integers only if its output, possibly behind a ReLU, is quantized in one
    place. If only discrete layers with one input quantizer read it, that quantizer does it.
    Additions, other readers, pooling and other activations need an output quantizer. All operands
    of an addition need one if one of them comes from a convolution or such an addition, and so does
    a sum that is only pooled: an 8-bit sum is faster than a float one. The output of linear layers
    is float in any case.
    """
    discrete = {layer.name: layer.input_of or layer.name for layer in layers}
    wanted: dict[Value, None] = {}
    kept = []
    integer: set[Value] = set()  # outputs of integer kernels

    def settled(value: Value) -> bool:
        readers = recording.readers[value]
        quantizers = {discrete.get(call.name) if call.is_module else None for call in readers}
        return len(quantizers) == 1 and None not in quantizers

    for call in recording.calls:
        if call.kind in ADDITIONS and not call.is_module and integer & set(call.inputs):
            if all(_owner(value, recording) for value in call.inputs):
                ends = _rectified(call.outputs[0], recording)
                integer.update(ends)
                averaged = ends[:1] if _is_only_pooled(ends[0], recording) else []
                wanted.update(dict.fromkeys([*call.inputs, *averaged]))
            else:
                why = "an operand is not the output of a module that runs once"
                kept.append(Kept(call.name, "addition", why))
        kind = kind_of(modules[call.name]) if call.is_module and call.name in discrete else None
        if kind is not None and kind.quantized_output:
            ends = _ends(call, layers, recording)
            integer.update(ends)
            if settled(ends[0]) or ends[0] in recording.result:
                continue
            output = next((value for value in ends if _owner(value, recording)), None)
            if {reader.kind for reader in recording.readers[ends[0]]} == {"flatten"}:
                # OpenVINO 2026.4 adds the first channel's bias to all channels of such a kernel.
                why = "it makes tokens, which OpenVINO computes wrongly with an integer kernel"
                kept.append(Kept(call.name, "output", why))
            elif output is not None:
                wanted[output] = None
            else:
                why = "no module that runs once returns it, so its kernel stays float"
                kept.append(Kept(call.name, "output", why))
    owners = [_owner(value, recording) for value in wanted]
    points = {name: name for name in owners if name is not None}
    for call in recording.calls:
        # The maximum of 8-bit values is one of them: with the same grid, pooling stays integer.
        if call.kind == "MaxPool2d" and (pooled := _owner(call.outputs[0], recording)):
            source = points.get(_owner(call.inputs[0], recording) or "")
            if source is not None:
                points[pooled] = source
    return points, kept


def _is_only_pooled(value: Value, recording: Recording) -> bool:
    """Whether averages are all that is taken of a value."""
    readers = {reader.kind for reader in recording.readers[value]}
    return bool(readers) and readers <= _POOLING and value not in recording.result


def _owner(value: Value, recording: Recording) -> str | None:
    """The innermost module that returned a value, if that module runs only once."""
    names = recording.returned_by.get(value)
    return names[0] if names and recording.times[names[0]] == 1 else None


def _ends(call: Call, layers: list[LayerPlan], recording: Recording) -> list[Value]:
    """The values that a convolution's kernel can end in, last first: a rectifier's, its norm's."""
    ends = [call.outputs[0]]
    norm = next(layer.norm for layer in layers if layer.name == call.name)
    if norm is not None:
        ends = [recording.readers[ends[0]][0].outputs[0]]
    return _rectified(ends[0], recording)


def _rectified(value: Value, recording: Recording) -> list[Value]:
    """A value, preceded by the output of a rectifier if that is its only reader."""
    readers = recording.readers[value]
    if len(readers) == 1 and readers[0].kind in _RECTIFIERS:
        return [readers[0].outputs[0], value]
    return [value]


def _kept_modules(
    layers: list[LayerPlan], recording: Recording, modules: dict[str, nn.Module]
) -> Iterator[Kept]:
    taken = {layer.name for layer in layers} | {layer.norm for layer in layers}
    for name, module in modules.items():
        has_own = next(module.parameters(recurse=False), None) is not None
        if name in taken or not (has_own or is_parametrized(module)):
            continue
        if ".parametrizations." in name:  # a part of a layer that is kept for it
            continue
        if not recording.times[name]:
            why = "its forward did not run in the recorded pass"
        elif isinstance(module, norm_classes()) and has_hooks(module):
            why = HOOKED
        elif isinstance(module, norm_classes()):
            why = "it does not directly follow one convolution that it could be folded into"
        else:
            why = (
                _why_not(name, recording, modules)
                or "it works on constants, so the runtime computes it once"
            )
        yield Kept(name, type(module).__name__, why)


def _kept_products(
    recording: Recording, modules: dict[str, nn.Module], lent: dict[Call, str]
) -> Iterator[Kept]:
    for call in recording.calls:
        if call.is_module or call in lent or is_parametrized(modules[call.name]):
            continue
        if call.kind in _PRODUCTS:
            yield Kept(call.name, call.kind, "products of two activations stay float")
        elif call.kind in _WEIGHTED_CALLS:
            yield Kept(call.name, call.kind, "a function call on weights that no layer owns")
