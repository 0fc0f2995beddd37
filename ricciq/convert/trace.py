"""What one forward pass did: which module or function made each tensor, and which ones read it.

Modules are seen by hooks; what happens between them, such as the ``x + shortcut`` of a residual
block, by a `TorchFunctionMode`. Nothing is traced symbolically, so any Python in a forward is fine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ricciq.evaluation import evaluating

Value = tuple[int, int]
"""A tensor at a moment: its identity and its version, since in-place operations change it."""


@dataclass(frozen=True)
class Call:
    """One call of an childless module, or of a function outside such modules.

    Attributes:
        name: the module's dotted name, or the name of the module whose forward called the function.
        kind: class name of the module, or name of the function.
        is_module: whether it was a module.
        inputs: the tensors read, in order.
        outputs: the tensors made.
    """

    name: str
    kind: str
    is_module: bool
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass
class Recording:
    """The calls of one forward pass, in order, and who touched each tensor.

    Attributes:
        calls: every childless module call and every function call between modules.
        readers: the calls that read a value.
        returned_by: names of the modules that returned just this value, innermost first.
        times: how often each module ran.
        first_argument: what each module was last called with, if that was a tensor.
        result: the values the model returned.
        constants: parameters, buffers and what was computed from nothing else.
    """

    calls: list[Call] = field(default_factory=list)
    readers: dict[Value, list[Call]] = field(default_factory=lambda: defaultdict(list))
    returned_by: dict[Value, list[str]] = field(default_factory=lambda: defaultdict(list))
    times: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    first_argument: dict[str, Value] = field(default_factory=dict)
    result: tuple[Value, ...] = ()
    constants: set[Value] = field(default_factory=set)

    def add(self, call: Call) -> None:
        """Append a call, unless it only handed its input on, as Identity and idle dropout do."""
        if set(call.outputs) <= set(call.inputs):
            return
        self.calls.append(call)
        if self.constants.issuperset(call.inputs):
            self.constants.update(call.outputs)
        for value in dict.fromkeys(call.inputs):
            self.readers[value].append(call)

    def producer(self, value: Value) -> Call | None:
        """The call that made a value, or None for the model's input and for constants."""
        return next((c for c in self.calls if value in c.outputs and value not in c.inputs), None)


def _tensors(*trees: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(trees):
        if isinstance(leaf, Tensor):
            yield leaf


def value_of(tensor: Tensor) -> Value:
    """What identifies a tensor at this moment."""
    return (id(tensor), tensor._version)


class _FunctionRecorder(TorchFunctionMode):
    """Reports the functions called while no childless module is running."""

    def __init__(self, report: Callable[[str, tuple[Value, ...], Any], None]) -> None:
        super().__init__()
        self.report = report

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = tuple(value_of(t) for t in _tensors(args, kwargs))
        result = func(*args, **kwargs)
        self.report(getattr(func, "__name__", str(func)), inputs, result)
        return result


@torch.no_grad()
def record(model: nn.Module, example: Tensor) -> Recording:
    """Run ``model(example)`` in evaluation mode and note what it did.

    Args:
        model: any module; its training mode is restored afterwards.
        example: (B, C, H, W) input on the model's device.

    Returns:
        The recording; a function that makes no tensor is left out.
    """
    with evaluating(model):
        model(example)  # some models make constants when first called, and keep them
    recording = Recording(constants={value_of(t) for t in [*model.parameters(), *model.buffers()]})
    alive: list[Any] = []  # identities are unique only as long as nothing recorded is freed
    running: list[tuple[str, bool, tuple[Value, ...]]] = []

    def enter(name: str, whole: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG001
            alive.append((args, kwargs))
            if args and isinstance(args[0], Tensor):
                recording.first_argument[name] = value_of(args[0])
            running.append((name, whole, tuple(value_of(t) for t in _tensors(args, kwargs))))

        return hook

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
        alive.append(output)
        name, whole, inputs = running.pop()
        outputs = tuple(value_of(t) for t in _tensors(output))
        recording.times[name] += 1
        if isinstance(output, Tensor):  # a point can stand behind one tensor, not behind a tuple
            recording.returned_by[outputs[0]].append(name)
        if whole and not any(outer for _, outer, _ in running):
            recording.add(Call(name, type(module).__name__, True, inputs, outputs))

    def note(function: str, inputs: tuple[Value, ...], result: Any) -> None:
        outputs = tuple(value_of(t) for t in _tensors(result))
        if not inputs or not outputs or any(whole for _, whole, _ in running):
            return
        alive.append(result)
        name = running[-1][0] if running else ""
        recording.add(Call(name, function, False, inputs, outputs))

    with evaluating(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            whole = next(module.children(), None) is None
            before = module.register_forward_pre_hook(enter(name, whole), with_kwargs=True)
            after = module.register_forward_hook(leave, with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        with _FunctionRecorder(note):
            result = model(example)
    recording.result = tuple(value_of(t) for t in _tensors(result))
    return recording
