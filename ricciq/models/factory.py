"""A float model and its preprocessing, from a timm name or a checkpoint.

Importing this module registers the networks of `ricciq.models.bundled` with timm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from timm import get_pretrained_cfg, is_model, list_models
from timm.data.config import resolve_data_config
from timm.models import create_model
from torch import nn

import ricciq.models.bundled  # noqa: F401  registers them
from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import ModelError, did_you_mean
from ricciq.models.weights import (
    adapt_weights,
    head_message,
    load_weights,
    names_of_layers,
    read_checkpoint,
    stem_message,
)
from ricciq.system.offline import is_network_forbidden
from ricciq.system.tensor_files import check_finite


class LoadedModel(NamedTuple):
    """A float model with its preprocessing.

    Attributes:
        model: in evaluation mode; maps images (B, C, H, W) to logits (B, num_classes).
        preprocessing: size and normalization of its input.
        messages: what was changed to make the weights fit, a sentence for each change.
    """

    model: nn.Module
    preprocessing: Preprocessing
    messages: list[str]


def load_model(
    name: str,
    *,
    num_classes: int | None = None,
    channels: int = 3,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    input_size: int | None = None,
    seed: int | None = None,
) -> LoadedModel:
    """Create a timm model and load its weights.

    Args:
        name: timm's name, with or without a tag, such as "resnet50.a1_in1k".
        num_classes: size of the head; None takes that of the weights.
        channels: number of input channels, 1 or 3.
        checkpoint: file of weights to load; takes precedence over `pretrained`.
        pretrained: load the weights that timm has for this name.
        input_size: height and width in pixels; None takes the model's own.
        seed: of random weights; None draws from torch's global generator.

    Returns:
        The float model, its preprocessing, and what was changed to make the weights fit.

    Raises:
        ModelError: the name or tag is unknown, its pretrained weights are not available, or it does
            not support images of `input_size`.
        CheckpointError: the checkpoint is missing, unreadable, unsafe or of another model.
    """
    config = _find_config(name)
    pretrained = pretrained and checkpoint is None
    if pretrained and not (config and config.has_weights):
        raise ModelError(
            f"timm has no pretrained weights for {name!r}; give a file with --checkpoint, or set "
            "`pretrained: false` in a recipe"
        )
    if pretrained and config.url and not (config.file or config.hf_hub_id):
        _check_cached(name, config.url)
    weights = None if checkpoint is None else read_checkpoint(checkpoint)
    if num_classes is None and weights is not None and config:
        heads = [f"{head}.weight" for head in names_of_layers(config.classifier)]
        there = (weights[head] for head in heads if head in weights)
        num_classes = next((len(head) for head in there if head.ndim > 1 and head.numel()), None)
    arguments: dict[str, Any] = {"in_chans": channels}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if input_size and config and config.fixed_input_size:  # set when such a model is built
        arguments["img_size"] = input_size
    with _seeded(seed):
        try:
            model: nn.Module = create_model(name, pretrained=pretrained, **arguments)
        except Exception as error:  # the hub client and each model raise their own errors
            raise _not_created(name, pretrained, error) from error
    messages: list[str] = []
    if checkpoint is not None and weights is not None:
        check_finite(weights, model.state_dict(), checkpoint)
        messages = adapt_weights(model, weights)
        load_weights(model, weights, name, checkpoint)
    elif pretrained and config:
        if num_classes not in (None, config.num_classes):
            messages.append(head_message(config.num_classes, num_classes))
        if config.input_size[0] != channels:
            messages.append(stem_message(config.input_size[0], channels))
    preprocessing = _preprocessing(model.eval(), channels, input_size)
    if input_size:
        _try_size(model, name, preprocessing.input_size)
    return LoadedModel(model, preprocessing, messages)


def _find_config(name: str) -> Any:
    """timm's PretrainedCfg of a name; None for deprecated names that timm still maps."""
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
    return ModelError(
        f"the pretrained weights of {name!r} would be downloaded, which --offline or "
        "HF_HUB_OFFLINE forbids; run once without it, or give a file with --checkpoint"
    )


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


def _preprocessing(model: nn.Module, channels: int, input_size: int | None) -> Preprocessing:
    config: dict[str, Any] = resolve_data_config(model=model)  # type: ignore[no-untyped-call]
    _, height, width = config["input_size"]
    size = (channels, input_size or height, input_size or width)
    normalization = {key: _per_channel(config[key], channels) for key in ("mean", "std")}
    return Preprocessing.from_dict(config | normalization | {"input_size": size})


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One value for each channel; if their number changes, each is the mean of the given ones."""
    if len(values) == channels:
        return values
    return (sum(values) / len(values),) * channels
