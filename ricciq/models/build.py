"""Build timm's models without weights.

Importing this module registers the networks of `ricciq.models.bundled` with timm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from timm import get_pretrained_cfg, is_model, list_models
from timm.models import _builder, create_model
from timm.utils import reparameterize_model
from torch import Tensor, nn

import ricciq.models.bundled  # noqa: F401  registers them
from ricciq.errors import ModelError, did_you_mean

Rename = Callable[..., Mapping[str, Tensor]]
"""From the tensors of a file, and a model, to tensors by the names of the model."""
RESERVED = {*signature(create_model).parameters, "num_classes", "features_only"}
"""Arguments of timm's constructors that ricciq does not pass on."""
_FUSE = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods by which timm merges the branches of a block."""


def find_config(name: str) -> Any:
    """timm's PretrainedCfg of a name; None for deprecated names that timm still maps.

    Args:
        name: timm's name, with or without a tag.

    Raises:
        ModelError: timm knows no such model or tag.
    """
    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        hint = did_you_mean(architecture, list_models(), "give one that timm.list_models() names")
        raise ModelError(f"timm knows no model {architecture!r}; {hint}")
    try:
        return get_pretrained_cfg(name)
    except RuntimeError as error:
        known = list_models(architecture, include_tags=True)
        tags = [full.partition(".")[2] for full in known if "." in full]
        hint = did_you_mean(tag, tags, f"give {' or '.join([*tags, 'none'])}")
        raise ModelError(f"model {architecture!r} has no tag {tag!r}; {hint}") from error


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that ricciq sets itself, or that would load files.

    Args:
        arguments: of timm's constructor.

    Raises:
        ModelError: there is one.
    """
    for key in arguments:
        if key in RESERVED or key.startswith("pretrained"):
            raise ModelError(
                f"model.kwargs {key} cannot be set, since ricciq decides it; remove it"
            )
    if (channels := arguments.get("in_chans", 3)) not in (1, 3):
        raise ModelError(f"model.kwargs in_chans {channels} is not supported; give 1 or 3")


def build(name: str, arguments: Mapping[str, Any], seed: int | None) -> nn.Module:
    """Build a model with random weights.

    Args:
        name: timm's name.
        arguments: of timm's constructor.
        seed: of the weights; None draws from torch's global generator.

    Raises:
        ModelError: timm cannot build it.
    """
    try:
        with seeded(seed):
            return create_model(name, **arguments)
    except Exception as error:  # each model raises its own errors
        raise ModelError(
            f"timm cannot build model {name!r} ({reason(error)}); give another model"
        ) from error


def build_for_weights(
    name: str, arguments: Mapping[str, Any], seed: int | None
) -> tuple[nn.Module, Rename | None]:
    """Build a model as timm does for its pretrained weights, which are then not loaded.

    Args:
        name: timm's name.
        arguments: of timm's constructor.
        seed: of the weights; None draws from torch's global generator.

    Returns:
        The model, and timm's function from the names and shapes of original checkpoints to its own;
        None if it needs none.

    Raises:
        ModelError: timm cannot build it.
    """
    found: list[Rename | None] = [None]

    def load(*_: Any, filter_fn: Rename | None = None, **__: Any) -> None:
        found[0] = filter_fn

    with _loading_by(load):
        model = build(name, {**arguments, "pretrained": True}, seed)
    return model, found[0]


@contextmanager
def _loading_by(load: Callable[..., None]) -> Iterator[None]:
    """Let a function take the place of timm's own that loads weights: only it gets the filter."""
    own = _builder.load_pretrained
    _builder.load_pretrained = load
    try:
        yield
    finally:
        _builder.load_pretrained = own


def fused(model: nn.Module) -> nn.Module | None:
    """A copy of a model with the branches of its blocks merged, as in RepVGG; by timm.

    Args:
        model: in evaluation mode.

    Returns:
        The copy, which computes the same; None if there is nothing to merge.
    """
    if not any(hasattr(part, method) for part in model.modules() for method in _FUSE):
        return None
    copy: nn.Module = reparameterize_model(model).eval()
    return None if copy.state_dict().keys() == model.state_dict().keys() else copy


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch for a block, and restore the global generator after it.

    Args:
        seed: None leaves the generator as it is.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def reason(error: Exception) -> str:
    """The kind of an error, and the first line of its message.

    Args:
        error: of another library.
    """
    first_line = (str(error).splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
