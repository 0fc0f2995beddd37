"""Weights from files, which may be hostile: read them, adapt them, and load them into a model."""

from __future__ import annotations

import argparse
import os
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv, load_state_dict
from torch import Tensor, nn

from ricciq.errors import CheckpointError

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file, EMA weights if it has them; no code in it is run.

    Raises:
        CheckpointError: the file is missing, damaged or unsafe.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no checkpoint {path}; give the path of a file")
    if path.suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise CheckpointError(
            f"checkpoint {path} has none of the extensions {', '.join(CHECKPOINT_SUFFIXES)}; give "
            "a PyTorch or safetensors file"
        )
    try:
        # timm's training checkpoints hold a Namespace; older releases of timm did not allow it.
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(action="ignore"),  # what they warn about is refused below
        ):
            _check_compression(path)
            weights = load_state_dict(str(path), use_ema=True, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # damaged files raise nearly anything
        raise CheckpointError(
            f"checkpoint {path} is damaged or has objects other than tensors, so nothing was "
            f"loaded ({type(error).__name__}); save the weights again, best as .safetensors"
        ) from error
    size = path.stat().st_size
    for key, value in weights.items():
        if not _is_plain(value, size):
            raise CheckpointError(
                f"checkpoint {path} has {_described(value)} {key!r} instead of a plain tensor; "
                "give a file with a state dict"
            )
    return weights


def _check_compression(path: Path) -> None:
    """Refuse a compressed zip, which torch never writes: a small file could fill the memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise CheckpointError(
                f"checkpoint {path} is a compressed zip, which torch does not write; save the "
                "weights again with torch.save, or as .safetensors"
            )


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = "" if value.layout == torch.strided else f", {value.layout}"
    return f"a tensor ({value.dtype} {list(value.shape)} on {value.device.type}{kind})"


def _is_plain(value: Any, most: int) -> bool:
    """Whether a value is a dense CPU tensor of real numbers, of at most this many bytes."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_complex() or value.is_quantized)
        and value.nbytes <= most
    )


def adapt_weights(model: nn.Module, weights: dict[str, Tensor]) -> tuple[list[str], bool]:
    """Adapt weights in place to the head and the input channels of a model.

    Args:
        model: a timm model.
        weights: by the model's names.

    Returns:
        What was changed, a sentence for each change, and whether the head is a random one.
    """
    config: Any = model.pretrained_cfg
    own = model.state_dict()
    messages, new_head = [], False
    for name in names_of_layers(config["first_conv"]):
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
        messages.append(stem_message(before, after))
    for name in names_of_layers(config["classifier"]):
        key = f"{name}.weight"
        if key not in weights or key not in own or weights[key].shape[1:] != own[key].shape[1:]:
            continue
        before, after = len(weights[key]), len(own[key])
        if before != after:
            weights.update({k: own[k] for k in (key, f"{name}.bias") if k in own})
            messages.append(head_message(before, after))
            new_head = True
    return messages, new_head


def names_of_layers(value: str | Iterable[str] | None) -> Iterable[str]:
    """The names of layers in a timm config: a string is one, a tuple several, None is none."""
    return (value,) if isinstance(value, str) else value or ()


def head_message(before: int, after: int) -> str:
    """The message about a head of another size.

    Args:
        before: number of classes in the weights.
        after: number of classes of the model.
    """
    return f"the head for {before} classes was replaced by a random one for {after}"


def stem_message(before: int, after: int) -> str:
    """The message about a first convolution for another number of channels.

    Args:
        before: input channels in the weights.
        after: input channels of the model.
    """
    return f"the first convolution was adapted from {before} to {after} channels"


def load_weights(model: nn.Module, weights: dict[str, Tensor], name: str, path: Path) -> None:
    """Load weights into a model.

    Args:
        model: the model to change.
        weights: by the model's names, after `adapt_weights`.
        name: of the model, for error messages.
        path: of the file, for error messages.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
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
            f"checkpoint {path} does not fit model {name!r} ({found}); give the model that it was "
            "saved from"
        )


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
