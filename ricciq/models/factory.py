"""A float model and its preprocessing, from a timm name or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from timm.data.config import resolve_data_config
from timm.models import create_model
from torch import nn

from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import CheckpointError, ModelError
from ricciq.models.build import (
    build,
    build_for_weights,
    check_arguments,
    find_config,
    fused,
    reason,
    seeded,
)
from ricciq.models.fit import (
    Fitted,
    adapt_weights,
    check_codes,
    classifiers,
    fit_names,
    head_message,
    load_weights,
    names_of_layers,
    stem_message,
)
from ricciq.models.pretrained import FloatWeights, read_weights
from ricciq.models.written import Written
from ricciq.system.offline import is_network_forbidden, would_be_downloaded
from ricciq.system.tensor_files import check_finite


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
        is_fused: whether branches of its blocks were merged.
    """

    model: nn.Module
    preprocessing: Preprocessing
    messages: list[str]
    kwargs: dict[str, Any]
    has_new_head: bool
    class_names: list[str] | None
    is_fused: bool


def load_model(
    name: str,
    *,
    num_classes: int | None = None,
    channels: int | None = 3,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    as_pretrained: bool = False,
    input_size: int | tuple[int, int] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    fuse: bool | None = None,
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
        as_pretrained: without weights, build the model as for those of timm: some differ, as in the
            epsilon of their BatchNorms.
        input_size: (height, width), or one number for both, in pixels; None takes the size that is
            written beside the weights, or else the model's own.
        preprocessing: keys of `Preprocessing` that differ from what is written beside the weights,
            or else from timm's.
        kwargs: more arguments of timm's constructor, such as ``{"global_pool": "max"}``.
        fuse: merge the branches of blocks as in RepVGG, by timm's `reparameterize_model`; None does
            so if weights are loaded, for training from random ones needs the branches.
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
    input_size = input_size or _image_size(kwargs or {})
    size = _sides(input_size, written)
    kwargs = {**written.arguments, **(kwargs or {})}
    check_arguments(kwargs)
    arguments = {"in_chans": channels, "num_classes": num_classes, **kwargs, "img_size": None}
    if size and config and config.fixed_input_size:  # set when such a model is built
        arguments["img_size"] = size
    arguments = {key: value for key, value in arguments.items() if value is not None}
    if found is not None:
        filled = _load_file(found, name, config, arguments, seed)
    elif pretrained:
        filled = _load_pretrained(name, config, arguments, seed)
    else:
        make = _built_as_pretrained if as_pretrained else build
        filled = _Filled(make(name, arguments, seed), arguments.get("in_chans"))
    model, own_channels, changes, new_head, is_fused = filled
    messages = [*changes]
    model.eval()
    if not is_fused and (bool(found or pretrained) if fuse is None else fuse):
        merged = fused(model)
        model, is_fused = (model, False) if merged is None else (merged, True)
    if is_fused:
        messages.append(f"the branches of the blocks of {name} are merged, as for inference")
    usual: dict[str, Any] = resolve_data_config(model=model)  # type: ignore[no-untyped-call]
    channels = own_channels or usual["input_size"][0]
    given = preprocessing or {}
    prepared = _preprocessing(usual, channels, size, written, given)
    if found and prepared != _preprocessing(
        usual, channels, _sides(input_size, Written()), Written(), given
    ):
        messages.append(f"the preprocessing is that of {written.path}: {prepared.brief}")
    if prepared.input_size[1:] != tuple(usual["input_size"][1:]):
        _try_size(model, name, prepared.input_size)
    return LoadedModel(model, prepared, messages, kwargs, new_head, written.class_names, is_fused)


def _image_size(kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """The img_size among arguments of timm's constructor: a number of pixels, or two.

    Raises:
        ModelError: it is something else.
    """
    given = kwargs.get("img_size")
    if given is None:
        return None
    sides = given if isinstance(given, list | tuple) else (given, given)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ModelError(f"model.kwargs img_size {given!r} is no size in pixels; give [160, 224]")
    height, width = sides
    return height, width


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
    except (TypeError, ValueError, OverflowError):
        raise CheckpointError(
            f"{written.path} has an invalid input_size, {size!r}; correct it"
        ) from None
    return height, width


def _check_cached(name: str, url: str) -> None:
    """Refuse weights at a plain URL that torch would download while the network is forbidden."""
    file = Path(urlparse(url).path).name
    if is_network_forbidden() and not Path(torch.hub.get_dir(), "checkpoints", file).is_file():
        raise _would_be_downloaded(name)


def _would_be_downloaded(name: str) -> ModelError:
    what = f"the pretrained weights of {name!r}"
    return ModelError(would_be_downloaded(what, "give a file with --checkpoint"))


class _Filled(NamedTuple):
    """A model with its weights.

    Attributes:
        model: of timm.
        channels: of its input; None if that is timm's default.
        messages: what was changed to make the weights fit, a sentence for each change.
        has_new_head: whether its head is random, since the weights have other classes.
        is_fused: whether its branches are merged, as they were in the file.
    """

    model: nn.Module
    channels: int | None
    messages: Sequence[str] = ()
    has_new_head: bool = False
    is_fused: bool = False


def _load_pretrained(
    name: str, config: Any, arguments: Mapping[str, Any], seed: int | None
) -> _Filled:
    """Load the weights that timm has for a model.

    Raises:
        ModelError: they are not available, or do not fit the arguments.
    """
    try:
        with seeded(seed):
            model: nn.Module = create_model(name, pretrained=True, **arguments)
    except Exception as error:  # the hub client and each model raise their own errors
        if is_network_forbidden():
            raise _would_be_downloaded(name) from error
        raise ModelError(
            f"the pretrained weights of {name!r} cannot be loaded ({reason(error)}); give a file "
            "with --checkpoint"
        ) from error
    classes = arguments.get("num_classes", config.num_classes)
    channels = arguments.get("in_chans", config.input_size[0])
    has_new_head, messages = classes != config.num_classes, []
    if has_new_head:
        messages.append(head_message(config.num_classes, classes))
    if channels != config.input_size[0]:
        messages.append(stem_message(config.input_size[0], channels))
    return _Filled(model, channels, messages, has_new_head)


def _built_as_pretrained(name: str, arguments: Mapping[str, Any], seed: int | None) -> nn.Module:
    return build_for_weights(name, arguments, seed)[0]


def _load_file(
    found: FloatWeights, name: str, config: Any, arguments: Mapping[str, Any], seed: int | None
) -> _Filled:
    """Build a model for the weights of a file, and load them.

    Without a number of classes or channels in ``arguments``, that of the weights is taken.

    Raises:
        ModelError: timm cannot build the model.
        CheckpointError: the weights do not fit.
    """

    def fitted() -> Fitted:
        model, by = build_for_weights(name, arguments, seed)
        if size := _sides(None, found.written):
            # To resample position embeddings of images that are not square.
            model.pretrained_model_args = {"img_size": size}  # type: ignore[assignment]
        return fit_names(model.eval(), found.tensors, by)

    if found.written.num_classes == 0:
        arguments = {"num_classes": 0, **arguments}
    fit = fitted()
    if config:
        built = {"num_classes": config.num_classes, "in_chans": config.input_size[0], **arguments}
        arguments = {**_shape_of(fit), **arguments}
        if {**built, **arguments} != built:
            fit = fitted()
    own = fit.model.state_dict()
    check_codes(fit.weights, own, found.file)
    check_finite(fit.weights, own, found.file)
    is_encoder = found.written.num_classes == 0
    needs_head = is_encoder and arguments["num_classes"] > 0
    messages, new_head = adapt_weights(fit.model, fit.weights, has_head=not needs_head)
    load_weights(fit.model, fit.weights, name, found.file)
    channels = arguments.get("in_chans")
    return _Filled(fit.model, channels, [*fit.messages, *messages], new_head, fit.is_fused)


def _shape_of(fit: Fitted) -> dict[str, int]:
    """The numbers of classes and of input channels in weights, as timm's arguments."""
    stems = names_of_layers(fit.model.pretrained_cfg["first_conv"])  # type: ignore[index]
    shape: dict[str, int] = {}
    for argument, layers, axis in (
        ("num_classes", classifiers(fit.model), 0),
        ("in_chans", stems, 1),
    ):
        for name in layers:
            weight = fit.weights.get(f"{name}.weight")
            if weight is not None and weight.ndim > 1 and weight.numel():
                shape[argument] = weight.shape[axis]
    return shape


def _try_size(model: nn.Module, name: str, size: tuple[int, int, int]) -> None:
    """Run the model once: most models fail in their forward pass at a size they do not support."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, *size))
    except Exception as error:
        raise ModelError(
            f"model {name!r} does not support images of {size[1]} pixels ({reason(error)}); give "
            "another input size"
        ) from error


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
