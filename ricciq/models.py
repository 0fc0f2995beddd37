"""A timm name or a checkpoint -> a float model and its preprocessing.

Importing this module registers the nets of `ricciq.nets` with timm.
"""

from __future__ import annotations

import argparse
import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from timm import get_pretrained_cfg, is_model, list_models
from timm.data.config import resolve_data_config
from timm.models import (
    adapt_input_conv,
    create_model,
    load_state_dict,
)
from torch import Tensor, nn

import ricciq.nets  # noqa: F401  registers them
from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import CheckpointError, ModelError, did_you_mean
from ricciq.system.offline import is_network_forbidden
from ricciq.system.tensor_files import check_finite

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")


class LoadedModel(NamedTuple):
    """A float model and what goes with it.

    Attributes:
        model: in evaluation mode; logits (B, num_classes) from pictures (B, C, H, W).
        preprocessing: what the model's input must look like.
        messages: what was changed to make weights fit, a sentence each.
    """

    model: nn.Module
    preprocessing: Preprocessing
    messages: list[str]


def load_model(
    name: str,
    *,
    num_classes: int | None,
    channels: int,
    checkpoint: Path | None,
    pretrained: bool,
    input_size: int | None = None,
    seed: int | None = None,
) -> LoadedModel:
    """Create a timm model and give it its weights.

    Args:
        name: timm's name, with or without a tag, such as "resnet50.a1_in1k".
        num_classes: size of the head; None leaves it as the weights have it.
        channels: 1 or 3 input channels.
        checkpoint: weights to load; goes before `pretrained`.
        pretrained: load the weights that timm knows under this name.
        input_size: height and width in pixels, instead of the model's own.
        seed: start of everything random; None draws from torch's global generator.

    Raises:
        ModelError: the name or tag is unknown, its pretrained weights cannot be had, or it cannot
            take pictures of `input_size`.
        CheckpointError: the checkpoint is missing, unreadable, unsafe or of another model.
    """
    config = _find_config(name)
    pretrained = pretrained and checkpoint is None
    if pretrained and not (config and config.has_weights):
        raise ModelError(
            f"timm has no pretrained weights for {name!r}: give a file with --checkpoint, or set "
            "`pretrained: false` in a recipe"
        )
    if pretrained and config.url and not (config.file or config.hf_hub_id):
        _check_cached(name, config.url)
    weights = None if checkpoint is None else _read_checkpoint(checkpoint)
    if num_classes is None and weights is not None and config:
        heads = [f"{head}.weight" for head in _names(config.classifier)]
        there = (weights[head] for head in heads if head in weights)
        num_classes = next((len(head) for head in there if head.ndim > 1 and head.numel()), None)
    arguments: dict[str, Any] = {"in_chans": channels}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if input_size and config and config.fixed_input_size:  # such models take it when built
        arguments["img_size"] = input_size
    with _seeded(seed):
        try:
            model: nn.Module = create_model(name, pretrained=pretrained, **arguments)
        except Exception as error:  # the hub client and each model raise errors of their own
            raise _not_created(name, pretrained, error) from error
    messages: list[str] = []
    if checkpoint is not None and weights is not None:
        check_finite(weights, model.state_dict(), checkpoint)
        messages = _adapt(model, weights)
        _load(model, weights, name, checkpoint)
    elif pretrained and config:
        if num_classes not in (None, config.num_classes):
            messages.append(_head_message(config.num_classes, num_classes))
        if config.input_size[0] != channels:
            messages.append(_stem_message(config.input_size[0], channels))
    preprocessing = _preprocessing(model.eval(), channels, input_size)
    if input_size:
        _try_size(model, name, preprocessing.input_size)
    return LoadedModel(model, preprocessing, messages)


def _find_config(name: str) -> Any:
    """timm's PretrainedCfg of a name; None for names that timm has given up but still maps."""
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
    """Refuse weights from a plain address, which torch would fetch, where there is no network."""
    file = Path(urlparse(url).path).name
    if is_network_forbidden() and not Path(torch.hub.get_dir(), "checkpoints", file).is_file():
        raise _would_be_downloaded(name)


def _would_be_downloaded(name: str) -> ModelError:
    return ModelError(
        f"the pretrained weights of {name!r} would be downloaded, which --offline or "
        "HF_HUB_OFFLINE forbids: start once without it, or give a file with --checkpoint"
    )


def _not_created(name: str, pretrained: bool, error: Exception) -> ModelError:
    if pretrained and is_network_forbidden():
        return _would_be_downloaded(name)
    if pretrained:
        return ModelError(
            f"the pretrained weights of {name!r} could not be loaded ({_reason(error)}): give a "
            "file with --checkpoint"
        )
    return ModelError(f"timm cannot build model {name!r} ({_reason(error)}): give another")


def _try_size(model: nn.Module, name: str, size: tuple[int, int, int]) -> None:
    """Most models find out in their forward pass that a size does not suit them."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, *size))
    except Exception as error:
        raise ModelError(
            f"model {name!r} cannot take pictures of {size[1]} pixels ({_reason(error)}): give "
            "another input size"
        ) from error


def _reason(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seed inside, and leave the global generator as it was."""
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
    """As many values as channels; where the number changes, each is the mean of the given ones."""
    if len(values) == channels:
        return values
    return (sum(values) / len(values),) * channels


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, of its EMA copy if it has one; nothing in it is executed.

    Raises:
        CheckpointError: there is no such file, or it is damaged, unsafe, or not finite.
    """
    if os.path.isdir(path):  # Path.is_dir raises where a name is too long
        raise CheckpointError(f"checkpoint {path} is a folder: give a file inside it")
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no checkpoint {path}: give the path of a file")
    if path.suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise CheckpointError(
            f"checkpoint {path} has none of the endings {', '.join(CHECKPOINT_SUFFIXES)}: give a "
            "PyTorch or safetensors file"
        )
    try:
        # timm's training checkpoints hold a Namespace; older releases of timm did not allow it.
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(action="ignore"),  # what they are about is refused below
        ):
            _check_packing(path)
            weights = load_state_dict(str(path), use_ema=True, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # damaged files raise nearly anything
        raise CheckpointError(
            f"checkpoint {path} is damaged or holds objects beside tensors, so nothing of it was "
            f"loaded ({type(error).__name__}): save the weights again, best as .safetensors"
        ) from error
    size = path.stat().st_size
    for key, value in weights.items():
        if not _is_plain(value, size):
            raise CheckpointError(
                f"checkpoint {path} holds {_described(value)} {key!r} where a plain tensor "
                "belongs: give a file with a state dict"
            )
    return weights


def _check_packing(path: Path) -> None:
    """Refuse a zip that is packed, as torch never writes it: a small one could fill the memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise CheckpointError(
                f"checkpoint {path} is a packed zip, which torch does not write: save the weights "
                "again with torch.save, or as .safetensors"
            )


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = "" if value.layout == torch.strided else f", {value.layout}"
    return f"a tensor ({value.dtype} {list(value.shape)} on {value.device.type}{kind})"


def _is_plain(value: Any, most: int) -> bool:
    """Whether something is a tensor whose numbers are all there, in so many bytes at most."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_complex() or value.is_quantized)
        and value.nbytes <= most
    )


def _adapt(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Make head and first convolution fit in place, and say what was changed."""
    config: Any = model.pretrained_cfg
    own = model.state_dict()
    messages = []
    for name in _names(config["first_conv"]):
        key = f"{name}.weight"
        if key not in weights or key not in own or weights[key].ndim != 4:
            continue
        before, after = weights[key].shape[1], own[key].shape[1]
        if (before, after) == (3, 1):
            weights[key] = adapt_input_conv(1, weights[key])
        elif (before, after) == (1, 3):
            weights[key] = weights[key].expand(-1, 3, -1, -1) / 3
        else:
            continue
        messages.append(_stem_message(before, after))
    for name in _names(config["classifier"]):
        key = f"{name}.weight"
        if key not in weights or key not in own or weights[key].shape[1:] != own[key].shape[1:]:
            continue
        before, after = len(weights[key]), len(own[key])
        if before != after:
            weights.update({k: own[k] for k in (key, f"{name}.bias") if k in own})
            messages.append(_head_message(before, after))
    return messages


def _names(value: str | Iterable[str] | None) -> Iterable[str]:
    """timm writes one layer as a string, several as a tuple, none as None."""
    return (value,) if isinstance(value, str) else value or ()


def _head_message(before: int, after: int) -> str:
    return f"the head for {before} classes was replaced by a random one for {after}"


def _stem_message(before: int, after: int) -> str:
    return f"the first convolution was adapted from {before} to {after} channels"


def _load(model: nn.Module, weights: dict[str, Tensor], name: str, path: Path) -> None:
    own = model.state_dict()
    odd = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    fitting = {key: value for key, value in weights.items() if key not in odd}
    missing, unexpected = model.load_state_dict(fitting, strict=False)
    missing = [key for key in missing if key not in odd]
    if odd or missing or unexpected:
        misshapen = [f"{key} {list(weights[key].shape)} for {list(own[key].shape)}" for key in odd]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
        found = "; ".join(f"{kind}: {_first(keys)}" for kind, keys in kinds.items() if keys)
        raise CheckpointError(
            f"checkpoint {path} does not fit model {name!r} ({found}): give the model that it was "
            "saved from"
        )


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
