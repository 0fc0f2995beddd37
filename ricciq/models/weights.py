"""Read weights from files, which may be hostile."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from ricciq.errors import CheckpointError
from ricciq.models.pickled import Note, load_pickled

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
INDEX_SUFFIX = ".index.json"
"""Of the list of files over which weights are spread."""
MOST_INDEX_BYTES = 10_000_000
_WEIGHTS_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where timm looks for weights in a training checkpoint, in this order: averaged ones first."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, EMA weights if it has them; no code in it is run.

    Args:
        path: of a file, or of the index of several files.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe, or has no float weights.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no checkpoint {path}; give the path of a file")
    if path.name.endswith(INDEX_SUFFIX):
        return {k: v for part in files_of(path) for k, v in read_checkpoint(part).items()}
    if path.suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise CheckpointError(
            f"checkpoint {path} has none of the extensions {', '.join(CHECKPOINT_SUFFIXES)}; give "
            "a PyTorch or safetensors file"
        )
    try:
        weights = _weights_in(path)
    except CheckpointError:
        raise
    except Exception as error:  # damaged files raise nearly anything
        raise CheckpointError(
            f"checkpoint {path} is damaged or has objects other than tensors, so nothing was "
            f"loaded ({type(error).__name__}); save the weights again, best as .safetensors"
        ) from error
    _check_weights(weights, path)
    return weights


def _weights_in(path: Path) -> dict[str, Any]:
    """The state dict in a file, without the prefixes of parallel and compiled models."""
    if path.suffix.lower() == ".safetensors":
        return clean_state_dict(load_file(path))
    stored = load_pickled(path)
    keys = (key for key in _WEIGHTS_KEYS if stored.get(key) is not None)
    key = next(keys, None)
    return clean_state_dict(stored if key is None else stored[key])


def files_of(index: Path) -> list[Path]:
    """The files over which weights are spread.

    Args:
        index: the list of them, beside them.

    Raises:
        CheckpointError: it is not such an index, or names a file elsewhere.
    """
    try:
        if index.stat().st_size > MOST_INDEX_BYTES:
            raise ValueError
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(os.path.basename(name) != name or name.endswith(INDEX_SUFFIX) for name in names):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{index} does not list files of weights in its folder; give a file of weights"
        ) from None
    return [index.parent / name for name in names]


def _check_weights(weights: Mapping[str, Any], path: Path) -> None:
    """Check that there are weights, all of them plain tensors and none of them codes.

    Raises:
        CheckpointError: there is something else.
    """
    if not any(isinstance(value, Tensor) for value in weights.values()):
        kinds = ", ".join(str(key) for key in [*weights][:3]) or "nothing"
        raise CheckpointError(
            f"checkpoint {path} has no weights, but {kinds}; give a file with a state dict"
        )
    size = path.stat().st_size
    for key, value in weights.items():
        if _is_quantized(key, value):
            raise CheckpointError(
                f"checkpoint {path} has quantized weights, such as {key!r}, which cannot be "
                "trained; give the float model that they were made of"
            )
        if not _is_plain(value, size):
            raise CheckpointError(
                f"checkpoint {path} has {_described(value)} {key!r} instead of a plain tensor; "
                "give a file with a state dict"
            )


def _is_quantized(key: Any, value: Any) -> bool:
    """Whether a value has integer codes: of torch.ao, or bytes, which no float model has."""
    if isinstance(value, Tensor):
        return value.is_quantized or value.dtype in (torch.int8, torch.uint8)
    return "_packed_params" in str(key)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "another object" if isinstance(value, Note) else type(value).__name__
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
