"""Where float weights lie: a file, a folder as timm writes it, or a repository of the hub."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.errors import EntryNotFoundError
from timm.models._hub import download_from_hf
from torch import Tensor

from ricciq.errors import CheckpointError, on_one_line
from ricciq.models.names import FOLDER, HUB, architecture
from ricciq.models.weights import read_checkpoint
from ricciq.models.written import Written, read_config, read_written_in
from ricciq.system.offline import is_network_forbidden, would_be_downloaded

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth")
"""Names of weights in such a folder, in order of preference."""


class FloatWeights(NamedTuple):
    """Float weights, and what is known of them.

    Attributes:
        tensors: by the model's names.
        file: where they were read.
        written: what is written with them.
    """

    tensors: dict[str, Tensor]
    file: Path
    written: Written


def read_weights(checkpoint: Path, name: str) -> FloatWeights:
    """Read the weights of a model, and what is written with them.

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
    return FloatWeights(read_checkpoint(file), file, config or read_written_in(file))


def class_names_of(checkpoint: Path) -> list[str] | None:
    """The class names that are written with weights, without reading the weights.

    Args:
        checkpoint: as for `read_weights`.

    Returns:
        A name for each logit, in their order: ``label_names`` of timm's config.json, or the classes
        of the data of a run of ricciq. None if they are not written.

    Raises:
        CheckpointError: the checkpoint is missing, or its config.json damaged.
    """
    file, config = _find(checkpoint)
    if not os.path.isfile(file):
        raise CheckpointError(f"there is no checkpoint {file}; give the path of a file")
    return (config or read_written_in(file)).class_names


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


def _find(checkpoint: Path) -> tuple[Path, Written | None]:
    """The file of weights that the value of --checkpoint names, and the config.json beside it."""
    given = str(checkpoint)
    folder = _downloaded(given) if given.startswith(HUB) else checkpoint
    is_folder = os.path.isdir(folder)
    file = _weights_in(folder) if is_folder else folder
    config = file.parent / "config.json"
    there = os.path.isfile(config)
    return file, read_config(config, must_be_timm=is_folder) if there else None


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
