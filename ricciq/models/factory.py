"""A float model and its preprocessing, from a timm name or a checkpoint.

Importing this module registers the networks of `ricciq.models.bundled` with timm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from timm import get_pretrained_cfg, is_model, list_models
from timm.data.config import resolve_data_config
from timm.models import create_model
from torch import Tensor, nn

import ricciq.models.bundled  # noqa: F401  registers them
from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import CheckpointError, ModelError, did_you_mean
from ricciq.models.pretrained import read_weights
from ricciq.models.weights import (
    adapt_weights,
    head_message,
    load_weights,
    names_of_layers,
    stem_message,
)
from ricciq.models.written import Written
from ricciq.system.offline import is_network_forbidden, would_be_downloaded
from ricciq.system.tensor_files import check_finite

RESERVED = {*signature(create_model).parameters, "num_classes", "in_chans", "features_only"}
"""Arguments of timm's constructors that `load_model` does not pass on."""


class LoadedModel(NamedTuple):
    """A float model with its preprocessing.

    Attributes:
        model: in evaluation mode; maps images (B, C, H, W) to logits (B, num_classes).
        preprocessing: size and normalization of its input.
        messages: what was changed to make the weights fit, a sentence for each change.
        kwargs: arguments of timm's constructor, those asked for and those written with the weights.
        has_new_head: whether its head is random, since the weights have other classes.
        class_names: that are written with the weights, in the order of their logits; None if they
            are not written. A new head does not have these classes.
    """

    model: nn.Module
    preprocessing: Preprocessing
    messages: list[str]
    kwargs: dict[str, Any]
    has_new_head: bool
    class_names: list[str] | None


def load_model(
    name: str,
    *,
    num_classes: int | None = None,
    channels: int | None = 3,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    input_size: int | tuple[int, int] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> LoadedModel:
    """Create a timm model and load its weights.

    Args:
        name: timm's name, with or without a tag, such as "resnet50.a1_in1k".
        num_classes: size of the head; None takes that of the weights.
        channels: number of input channels, 1 or 3; None takes that of the weights.
        checkpoint: weights to load, as for `ricciq.models.pretrained.read_weights`; takes
            precedence over `pretrained`.
        pretrained: load the weights that timm has for this name.
        input_size: (height, width), or one number for both, in pixels; None takes the size that is
            written beside the weights, or else the model's own.
        preprocessing: keys of `Preprocessing` that differ from what is written beside the weights,
            or else from timm's.
        kwargs: more arguments of timm's constructor, such as ``{"global_pool": "max"}``.
        seed: of random weights; None draws from torch's global generator.

    Returns:
        The float model, its preprocessing, and what was changed to make the weights fit.

    Raises:
        ModelError: the name or tag is unknown, its pretrained weights are not available, or it does
            not support images of `input_size` or one of `kwargs`.
        CheckpointError: the checkpoint is missing, unreadable, unsafe or of another model.
        ValueError: a value of ``preprocessing`` is invalid.
    """
    config = find_config(name)
    pretrained = pretrained and checkpoint is None
    if pretrained and not (config and config.has_weights):
        raise ModelError(
            f"timm has no pretrained weights for {name!r}; give a file with --checkpoint, or set "
            "`pretrained: false` in a recipe"
        )
    if pretrained and config.url and not (config.file or config.hf_hub_id):
        _check_cached(name, config.url)
    found = None if checkpoint is None else read_weights(checkpoint, name)
    written = found.written if found else Written()
    size = _sides(input_size, written)
    if num_classes is None and found and config:
        num_classes = _classes_of(found.tensors, config)
    own_channels = _channels_of(found.tensors if found else {}, config)
    channels = own_channels if channels is None else channels
    kwargs = {**written.arguments, **(kwargs or {})}
    _check_kwargs(kwargs)
    needed: dict[str, Any] = {"in_chans": channels}
    if num_classes is not None:
        needed["num_classes"] = num_classes
    if size and config and config.fixed_input_size:  # set when such a model is built
        needed["img_size"] = size
    with _seeded(seed):
        try:
            model: nn.Module = create_model(name, pretrained=pretrained, **kwargs, **needed)
        except Exception as error:  # the hub client and each model raise their own errors
            raise _not_created(name, pretrained, error) from error
    messages: list[str] = []
    new_head = False
    if found is not None:
        check_finite(found.tensors, model.state_dict(), found.file)
        messages, new_head = adapt_weights(model, found.tensors)
        load_weights(model, found.tensors, name, found.file)
    elif pretrained and config:
        if num_classes is not None and num_classes != config.num_classes:
            new_head = True
            messages.append(head_message(config.num_classes, num_classes))
        if config.input_size[0] != channels:
            messages.append(stem_message(config.input_size[0], channels))
    usual: dict[str, Any] = resolve_data_config(model=model.eval())  # type: ignore[no-untyped-call]
    given = preprocessing or {}
    prepared = _preprocessing(usual, channels, size, written, given)
    if found and prepared != _preprocessing(
        usual, channels, _sides(input_size, Written()), Written(), given
    ):
        messages.append(f"the preprocessing is that of {written.path}: {prepared.brief}")
    if prepared.input_size[1:] != tuple(usual["input_size"][1:]):
        _try_size(model, name, prepared.input_size)
    return LoadedModel(model, prepared, messages, kwargs, new_head, written.class_names)


def _classes_of(weights: Mapping[str, Tensor], config: Any) -> int | None:
    """The number of classes in weights; None if they have no head."""
    heads = [f"{head}.weight" for head in names_of_layers(config.classifier)]
    there = (weights[head] for head in heads if head in weights)
    return next((len(head) for head in there if head.ndim > 1 and head.numel()), None)


def _channels_of(weights: Mapping[str, Tensor], config: Any) -> int:
    """The number of input channels in weights, or else those that timm's model has."""
    if config is None:
        return 3
    stems = [f"{stem}.weight" for stem in names_of_layers(config.first_conv)]
    there = (weights[stem] for stem in stems if stem in weights)
    return next((stem.shape[1] for stem in there if stem.ndim == 4), config.input_size[0])


def _check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that ricciq sets itself, or that would load files.

    Raises:
        ModelError: there is one.
    """
    for key in kwargs:
        if key in RESERVED or key.startswith("pretrained"):
            raise ModelError(
                f"model.kwargs {key} cannot be set, since ricciq decides it; remove it"
            )


def _sides(input_size: int | tuple[int, int] | None, written: Written) -> tuple[int, int] | None:
    """Height and width that are asked for or written beside the weights, in pixels.

    Raises:
        CheckpointError: what is written is no size.
    """
    if input_size:
        return (input_size, input_size) if isinstance(input_size, int) else input_size
    size = written.preprocessing.get("input_size")
    if size is None:
        return None
    try:
        _, height, width = (int(side) for side in size)
    except (TypeError, ValueError):
        raise CheckpointError(
            f"{written.path} has an invalid input_size, {size!r}; correct it"
        ) from None
    return height, width


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


def _check_cached(name: str, url: str) -> None:
    """Refuse weights at a plain URL that torch would download while the network is forbidden."""
    file = Path(urlparse(url).path).name
    if is_network_forbidden() and not Path(torch.hub.get_dir(), "checkpoints", file).is_file():
        raise _would_be_downloaded(name)


def _would_be_downloaded(name: str) -> ModelError:
    what = f"the pretrained weights of {name!r}"
    return ModelError(would_be_downloaded(what, "give a file with --checkpoint"))


def _not_created(name: str, pretrained: bool, error: Exception) -> ModelError:
    if pretrained and is_network_forbidden():
        return _would_be_downloaded(name)
    if pretrained:
        return ModelError(
            f"the pretrained weights of {name!r} cannot be loaded ({_reason(error)}); give a file "
            "with --checkpoint"
        )
    return ModelError(f"timm cannot build model {name!r} ({_reason(error)}); give another model")


def _try_size(model: nn.Module, name: str, size: tuple[int, int, int]) -> None:
    """Run the model once: most models fail in their forward pass at a size they do not support."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, *size))
    except Exception as error:
        raise ModelError(
            f"model {name!r} does not support images of {size[1]} pixels ({_reason(error)}); give "
            "another input size"
        ) from error


def _reason(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed torch for a block, and restore the global generator after it."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _preprocessing(
    usual: Mapping[str, Any],
    channels: int,
    sides: tuple[int, int] | None,
    written: Written,
    given: Mapping[str, Any],
) -> Preprocessing:
    """timm's preprocessing of a model, overridden by what is written and by what is asked for.

    Raises:
        CheckpointError: what is written is invalid.
        ValueError: what is asked for is invalid.
    """
    size = {"input_size": (channels, *(sides or usual["input_size"][1:]))}
    merged = {**usual, **written.preprocessing, **given, **size}
    try:
        normalization = {key: _per_channel(merged[key], channels) for key in ("mean", "std")}
        return Preprocessing.from_dict(merged | normalization)
    except (ValueError, TypeError) as error:
        if not written.preprocessing:
            raise
        raise CheckpointError(f"{written.path}: {error}; correct it") from None


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value for each channel; if their number changes, each is the mean of the given ones."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels
