"""Which discrete layer replaces which float one.

To add a kind of layer, write a module with a subclass of `QuantLayer`, set its traits, decorate it
with `quantizes`, and import the module in this package's ``__init__``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ricciq.layers.base import QuantLayer

Class = TypeVar("Class", bound=type[QuantLayer])
_KINDS: dict[tuple[type[nn.Module], bool], type[QuantLayer]] = {}
"""By the float class and whether a parent uses the layer's weight directly."""
HOOKED = "it has hooks, which see or change what it computes"
"""Why a module with hooks stays as it is."""
_BUILDING = {
    *vars(type("_", (nn.Module,), {})),
    *("__init__", "__repr__", "extra_repr", "reset_parameters", "__constants__"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
    *("__firstlineno__", "__static_attributes__"),
}
"""What a subclass may define without computing anything else."""


def quantizes(*floats: type[nn.Module], lent_to: str | None = None) -> Callable[[Class], Class]:
    """Register the decorated class as the discrete counterpart of float classes.

    Args:
        floats: the float classes. Subclasses that define more than how they are built stay float:
            they may compute anything.
        lent_to: name of the function that a parent calls with the layer's weight instead of
            calling the layer; None for a layer that is called.

    Raises:
        ValueError: a float class already has such a counterpart.
    """

    def register(kind: Class) -> Class:
        for float_class in floats:
            key = float_class, lent_to is not None
            if key in _KINDS:
                raise ValueError(f"{float_class.__name__} is quantized by {_KINDS[key].__name__}")
            _KINDS[key] = kind
        kind.lent_to = lent_to
        return kind

    return register


def kind_of(module: nn.Module | None, lent: bool = False) -> type[QuantLayer] | None:
    """The discrete counterpart of a float layer.

    Args:
        module: any module.
        lent: whether a parent uses its weight instead of calling it.

    Returns:
        A class, or None if there is none.
    """
    for float_class in type(module).__mro__:
        if (float_class, lent) in _KINDS:
            return _KINDS[float_class, lent]
        if not _BUILDING.issuperset(vars(float_class)):
            break
    return None


def layer_kinds() -> list[type[QuantLayer]]:
    """All discrete layers, in the order of registration."""
    return list(dict.fromkeys(_KINDS.values()))


def why_not(module: nn.Module) -> str | None:
    """Why a module has no discrete counterpart, or None if it has one."""
    if is_parametrized(module):
        return (
            "a parametrization computes its weight; fold it with "
            "torch.nn.utils.parametrize.remove_parametrizations to quantize the layer"
        )
    kind = kind_of(module)
    if kind is None:
        return f"{type(module).__name__} has no discrete counterpart"
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return (
            "hooks compute its weight, as pruning does; fold it with torch.nn.utils.prune.remove, "
            "remove_weight_norm or remove_spectral_norm to quantize the layer"
        )
    if type(weight) is not nn.Parameter or weight.dtype != torch.float32:
        described = type(weight).__name__ if weight.dtype == torch.float32 else weight.dtype
        return f"its weight is {described}, not float32"
    if has_hooks(module):
        return HOOKED
    if "forward" in vars(module):
        return "its forward was replaced"
    return kind.why_not(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether functions of others run before or after a module, forward or backward."""
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def float_classes() -> tuple[type[nn.Module], ...]:
    """The float classes that have a discrete counterpart."""
    return _unique(float_class for float_class, _ in _KINDS)


def norm_classes() -> tuple[type[nn.Module], ...]:
    """The classes of BatchNorm that a discrete layer can take in."""
    return _unique(norm for kind in layer_kinds() for norm in kind.norms)


def _unique(classes: Iterable[type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    return tuple(dict.fromkeys(classes))
