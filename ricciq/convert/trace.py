"""Records one forward pass: which module or function made each tensor, and which ones read it.

Hooks record the modules. A `TorchFunctionMode` records the functions between them, such as the
``x + shortcut`` of a residual block. Nothing is traced symbolically, so a forward may hold any
Python.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ricciq.errors import ModelError, RicciqError, is_out_of_memory, on_one_line
from ricciq.evaluation import evaluating

Value = tuple[int, int]
"""A tensor's identity and version; in-place operations change the version."""


@dataclass(frozen=True)
class Call:
    """One call of a module without children, or of a function outside such modules.

    Attributes:
        name: dotted name of the module, or of the module whose forward called the function.
        kind: class name of the module, or the function's name.
        is_module: whether a module was called.
        inputs: the tensors read, in order.
        outputs: the tensors returned.
        integers: of a function, the integers among its arguments, such as axes.
    """

    name: str
    kind: str
    is_module: bool
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    integers: tuple[int, ...] = ()


@dataclass
class Recording:
    """The calls of one forward pass, in order, and the readers of each tensor.

    Attributes:
        calls: calls of modules without children, and of functions between them.
        readers: the calls that read each value.
        returned_by: names of the modules that returned exactly this value, innermost first.
        times: how often each module ran.
        with_options: names of modules that were called otherwise than with one positional argument.
        first_argument: the first argument of each module's last call, if it was a tensor.
        given: the values the model was called with.
        result: the values the model returned.
        constants: parameters, buffers, and what was computed from them alone.
        shapes: the shape of each value that a call returned.
    """

    calls: list[Call] = field(default_factory=list)
    readers: dict[Value, list[Call]] = field(default_factory=lambda: defaultdict(list))
    returned_by: dict[Value, list[str]] = field(default_factory=lambda: defaultdict(list))
    times: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    with_options: set[str] = field(default_factory=set)
    first_argument: dict[str, Value] = field(default_factory=dict)
    given: tuple[Value, ...] = ()
    result: tuple[Value, ...] = ()
    constants: set[Value] = field(default_factory=set)
    shapes: dict[Value, torch.Size] = field(default_factory=dict)

    def add(self, call: Call) -> None:
        """Append a call, unless it returned its input unchanged, as Identity does."""
        if set(call.outputs) <= set(call.inputs):
            return
        self.calls.append(call)
        if self.constants.issuperset(call.inputs):
            self.constants.update(call.outputs)
        for value in dict.fromkeys(call.inputs):
            self.readers[value].append(call)


def _tensors(*trees: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(trees):
        if isinstance(leaf, Tensor):
            yield leaf


def value_of(tensor: Tensor) -> Value:
    """Identity and version of a tensor."""
    return (id(tensor), tensor._version)


class _FunctionRecorder(TorchFunctionMode):
    """Reports every function that torch calls, and what it was called with before it runs."""

    def __init__(
        self,
        keep: Callable[[Any], None],
        report: Callable[[str, tuple[Value, ...], Any, tuple[int, ...]], None],
    ) -> None:
        super().__init__()
        self.keep, self.report = keep, report

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = tuple(value_of(t) for t in _tensors(args, kwargs))
        self.keep((args, kwargs))
        integers = tuple(x for x in tree_leaves((args, kwargs)) if type(x) is int)
        result = func(*args, **kwargs)
        self.report(getattr(func, "__name__", str(func)), inputs, result, integers)
        return result


@contextmanager
def _explaining(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Say in a sentence that a model does not take its example."""
    try:
        yield
    except Exception as error:  # a model may raise anything
        if isinstance(error, RicciqError) or is_out_of_memory(error):
            raise
        raise ModelError(
            f"the model {type(model).__name__} fails on one tensor of shape {list(example.shape)} "
            f"({type(error).__name__}: {on_one_line(error, 200)}); give images that it takes, or "
            "wrap it in a module that takes nothing else"
        ) from error


def _check_padding(model: nn.Module, unrecorded: Any, recorded: Any) -> None:
    """Refuse a `nn.TransformerEncoder` whose fast path sets padding to zero, which no other does.

    Recording switches it off, as hooks do, and discrete layers.
    """
    if not any(getattr(module, "use_nested_tensor", False) for module in model.modules()):
        return
    for fast, slow in zip(_tensors(unrecorded), _tensors(recorded), strict=True):
        if fast.shape != slow.shape or not torch.allclose(fast, slow, rtol=1e-3, atol=1e-4):
            raise ModelError(
                "a TransformerEncoder of the model drops its padding in evaluation, but not in "
                "training or in a file; build it with enable_nested_tensor=False"
            )


@torch.no_grad()
def record(model: nn.Module, example: Tensor) -> Recording:
    """Run ``model(example)`` in evaluation mode and record its calls.

    Args:
        model: any module; its training mode is restored afterwards.
        example: (B, C, H, W) input on the model's device.

    Returns:
        The recording, without functions that return no tensor.

    Raises:
        ModelError: the model fails on the example, or computes otherwise while it is recorded.
    """
    with evaluating(model), _explaining(model, example):
        unrecorded = model(example)  # some models cache constants in their first call
    recording = Recording(constants={value_of(t) for t in [*model.parameters(), *model.buffers()]})
    recording.given = (value_of(example),)
    alive: list[Any] = []  # an id is unique only while its tensor is alive
    running: list[tuple[str, bool, tuple[Value, ...]]] = []

    def enter(name: str, whole: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG001
            alive.append((args, kwargs))
            if len(args) != 1 or kwargs:
                recording.with_options.add(name)
            if args and isinstance(args[0], Tensor):
                recording.first_argument[name] = value_of(args[0])
            running.append((name, whole, tuple(value_of(t) for t in _tensors(args, kwargs))))

        return hook

    def returned(output: Any) -> tuple[Value, ...]:
        shapes = {value_of(t): t.shape for t in _tensors(output)}
        recording.shapes.update(shapes)
        return tuple(shapes)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
        alive.append(output)
        name, whole, inputs = running.pop()
        outputs = returned(output)
        recording.times[name] += 1
        if isinstance(output, Tensor):  # a tuple has no output quantizer
            recording.returned_by[outputs[0]].append(name)
        if whole and not any(outer for _, outer, _ in running):
            recording.add(Call(name, type(module).__name__, True, inputs, outputs))

    def keep(arguments: Any) -> None:
        if not any(whole for _, whole, _ in running):
            alive.append(arguments)

    def note(
        function: str, inputs: tuple[Value, ...], result: Any, integers: tuple[int, ...]
    ) -> None:
        outputs = returned(result)
        if not inputs or not outputs or any(whole for _, whole, _ in running):
            return
        alive.append(result)
        name = running[-1][0] if running else ""
        recording.add(Call(name, function, False, inputs, outputs, integers))

    with evaluating(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            whole = next(module.children(), None) is None
            before = module.register_forward_pre_hook(enter(name, whole), with_kwargs=True)
            after = module.register_forward_hook(leave, with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        with _FunctionRecorder(keep, note):
            result = model(example)
    _check_padding(model, unrecorded, result)
    recording.result = tuple(value_of(t) for t in _tensors(result))
    return recording
