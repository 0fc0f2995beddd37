"""Where float weights lie, and the preprocessing that is written beside them.

timm writes it to the config.json of a folder or a hub repository, and to the ``args`` of a training
checkpoint; ricciq writes it to the metadata of a run's weights.
"""

from __future__ import annotations

import argparse
import json
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from timm.models._hub import download_from_hf, load_model_config_from_path
from torch import Tensor

from ricciq.errors import CheckpointError, on_one_line
from ricciq.models.names import FOLDER, HUB, architecture
from ricciq.models.weights import read_checkpoint
from ricciq.system.offline import is_network_forbidden, would_be_downloaded
from ricciq.system.tensor_files import METADATA_KEY

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth")
"""Names of weights in such a folder, in order of preference."""
MOST_CONFIG_BYTES = 10_000_000
"""Size of the largest config.json that is read; one for 21,841 classes has 2 MB."""
_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


class FloatWeights(NamedTuple):
    """Float weights, and what is known of them.

    Attributes:
        tensors: by the model's names.
        file: where they were read.
        arguments: of timm's constructor, with which the model was built.
        preprocessing: what is written about it, a part of the keys of `Preprocessing`.
        written_in: file with the preprocessing.
    """

    tensors: dict[str, Tensor]
    file: Path
    arguments: dict[str, Any]
    preprocessing: dict[str, Any]
    written_in: Path


def read_weights(checkpoint: Path, name: str) -> FloatWeights:
    """Read the weights of a model, and what is written about it.

    Args:
        checkpoint: a file; a folder as timm writes it, with config.json; or hf-hub:OWNER/NAME.
        name: timm's name of the model.

    Raises:
        CheckpointError: they are missing, damaged, unsafe or of another model, or the repository
            cannot be downloaded.
    """
    file, config = _find(checkpoint)
    own = architecture(name)
    if config is not None and config.architecture != own:
        if file != checkpoint:
            raise CheckpointError(
                f"checkpoint {checkpoint} has a {config.architecture}, not a {own}; give "
                f"{config.architecture} as the model"
            )
        config = None  # beside a file, it may belong to another one
    tensors = read_checkpoint(file)
    if config is None:
        return FloatWeights(tensors, file, {}, _written_in(file), file)
    return FloatWeights(tensors, file, config.arguments, config.preprocessing, config.path)


def model_in(name: str) -> tuple[str, Path]:
    """The architecture and the weights of a model in timm's form with a prefix.

    Args:
        name: hf-hub:OWNER/NAME, as a repository of the Hugging Face hub, or local-dir:FOLDER.

    Returns:
        timm's name of the architecture, and what to give to `read_weights`.

    Raises:
        CheckpointError: it is not there, or has no config.json of timm.
    """
    checkpoint = Path(name.removeprefix(FOLDER))
    if not name.startswith(HUB) and not os.path.isdir(checkpoint):
        raise CheckpointError(f"there is no folder {checkpoint}; check the path in {name}")
    file, config = _find(checkpoint)
    if config is None:
        raise CheckpointError(
            f"{checkpoint} has no config.json that names its model; give the timm name and "
            f"--checkpoint {file}"
        )
    return config.architecture, checkpoint


class _Config(NamedTuple):
    """What a config.json of timm says."""

    path: Path
    architecture: str
    arguments: dict[str, Any]
    preprocessing: dict[str, Any]


def _find(checkpoint: Path) -> tuple[Path, _Config | None]:
    """The file of weights that the value of --checkpoint names, and the config.json beside it."""
    given = str(checkpoint)
    folder = _downloaded(given) if given.startswith(HUB) else checkpoint
    is_folder = os.path.isdir(folder)
    file = _weights_in(folder) if is_folder else folder
    config = file.parent / "config.json"
    there = os.path.isfile(config)
    return file, _read_config(config, must_be_timm=is_folder) if there else None


def _written_in(file: Path) -> dict[str, Any]:
    """The preprocessing in weights of a run of ricciq, or in a training checkpoint of timm.

    The file was read before. Other files have none.
    """
    try:
        if file.suffix.lower() == ".safetensors":
            with safe_open(file, "pt") as tensors:
                stored = json.loads((tensors.metadata() or {}).get(METADATA_KEY, "{}"))
            return _known(stored["preprocessing"]) if "preprocessing" in stored else {}
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
        arguments = stored.get("args")
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError):
        return {}  # other tools have other metadata, and a state dict may have no get
    if not isinstance(arguments, argparse.Namespace):
        return {}
    values = {key: value for key, value in vars(arguments).items() if value not in (None, "")}
    side = values.get("img_size")
    if side is not None:
        values.setdefault("input_size", (3, side, side))
    return _known(values)


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in _KEYS if values.get(key) is not None}


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder.

    Raises:
        CheckpointError: there is none.
    """
    for name in WEIGHTS_FILES:
        if os.path.isfile(folder / name):
            return folder / name
    raise CheckpointError(
        f"folder {folder} has no {', '.join(WEIGHTS_FILES)}; give one that timm wrote, or a file "
        "of weights"
    )


def _read_config(path: Path, must_be_timm: bool) -> _Config | None:
    """Read a config.json; None if it is not one of timm.

    Raises:
        CheckpointError: the file is damaged, or not one of timm although it must be.
    """
    try:
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise ValueError("it is larger than 10 MB")
        config, named, arguments = load_model_config_from_path(path.parent)
        if not isinstance(named, str):
            raise TypeError("its architecture is no name")
        # The data decide the number of classes and channels.
        arguments = {k: v for k, v in arguments.items() if k not in ("num_classes", "in_chans")}
        return _Config(path, named, arguments, _known(config))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if not must_be_timm:
            return None
        reason = on_one_line(f"{type(error).__name__}: {error}", 160)
        raise CheckpointError(
            f"{path} is not a config.json as timm writes it ({reason}); give the file of weights "
            "instead of the folder"
        ) from None


def _downloaded(name: str) -> Path:
    """The folder in the hub's cache with the config and the weights of a repository.

    Raises:
        CheckpointError: they cannot be downloaded.
    """
    repository = name.removeprefix(HUB)
    try:
        config = Path(download_from_hf(repository, "config.json"))
        for file in WEIGHTS_FILES:
            with suppress(EntryNotFoundError):
                return Path(download_from_hf(repository, file)).parent
    except Exception as error:  # the hub client raises errors of several libraries
        if is_network_forbidden():
            raise _would_be_downloaded(name) from None
        reason = on_one_line(f"{type(error).__name__}: {error}", 160)
        raise CheckpointError(
            f"the weights of {name!r} cannot be loaded ({reason}); check the name, or give a file "
            "with --checkpoint"
        ) from None
    if is_network_forbidden():
        raise _would_be_downloaded(name)
    return config.parent


def _would_be_downloaded(name: str) -> CheckpointError:
    return CheckpointError(
        would_be_downloaded(f"the weights of {name!r}", "give a file with --checkpoint")
    )
