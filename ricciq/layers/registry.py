"""Which discrete layer replaces which float one.

To add a kind of layer, write a module with a subclass of `QuantLayer`, set its traits, decorate it
with `quantizes`, and import the module in this package's ``__init__``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import nn

from ricciq.layers.base import QuantLayer

Class = TypeVar("Class", bound=type[QuantLayer])
_KINDS: dict[tuple[type[nn.Module], bool], type[QuantLayer]] = {}
"""By the float class and whether a parent uses the layer's weight directly."""


def quantizes(*floats: type[nn.Module], lent_to: str | None = None) -> Callable[[Class], Class]:
    """Register the decorated class as the discrete counterpart of float classes.

    Args:
        floats: the float classes. Subclasses of them stay float: they may compute anything.
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
    return _KINDS.get((type(module), lent)) if module is not None else None


def layer_kinds() -> list[type[QuantLayer]]:
    """All discrete layers, in the order of registration."""
    return list(dict.fromkeys(_KINDS.values()))


def why_not(module: nn.Module) -> str | None:
    """Why a module has no discrete counterpart, or None if it has one."""
    kind = kind_of(module)
    if kind is None:
        return f"{type(module).__name__} has no discrete counterpart"
    return kind.why_not(module)


def float_classes() -> tuple[type[nn.Module], ...]:
    """The float classes that have a discrete counterpart."""
    return _unique(float_class for float_class, _ in _KINDS)


def norm_classes() -> tuple[type[nn.Module], ...]:
    """The classes of BatchNorm that a discrete layer can take in."""
    return _unique(norm for kind in layer_kinds() for norm in kind.norms)


def _unique(classes: Iterable[type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    return tuple(dict.fromkeys(classes))
