"""Where float weights lie: a file, a folder as timm writes it, or a repository of the hub."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.errors import EntryNotFoundError
from timm import get_pretrained_cfg, is_model
from timm.models._hub import download_from_hf
from torch import Tensor

from ricciq.errors import CheckpointError, on_one_line
from ricciq.models.fit import some_of
from ricciq.models.names import FOLDER, HUB, architecture, with_prefix
from ricciq.models.weights import CHECKPOINT_SUFFIXES, INDEX_SUFFIX, files_of, read_checkpoint
from ricciq.models.written import Written, read_config, read_written_in
from ricciq.system.offline import is_network_forbidden, would_be_downloaded

WEIGHTS_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    f"model.safetensors{INDEX_SUFFIX}",
    f"pytorch_model.bin{INDEX_SUFFIX}",
)
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
        checkpoint: a file; a folder as timm writes it, with config.json; or a repository of the
            hub, as for `model_in`.
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
    written = config or read_written_in(file)
    if written.is_quantized:
        raise CheckpointError(
            f"{file} has a model that is quantized already; start from a float run (--bits 32)"
        )
    return FloatWeights(tensors, file, written)


def model_in(name: str) -> tuple[str, Path]:
    """The architecture and the weights of a model that names itself.

    Args:
        name: a folder as timm writes it, or its weights; local-dir:FOLDER; hf-hub:OWNER/NAME, as a
            repository of the Hugging Face hub, or timm/NAME; or the timm name of a model with
            weights. The last three may end in @REVISION.

    Returns:
        timm's name of the architecture, and what to give to `read_weights`: of the hub, the exact
        commit.

    Raises:
        CheckpointError: it is not there, or has no config.json of timm.
    """
    place = _place(Path(name))
    if not os.path.exists(place):
        raise CheckpointError(
            f"there is no folder {place}; check the path in {name}, or give "
            f"{HUB}OWNER/NAME for a repository of the hub"
        )
    file, config = _find(place)
    if config is None:
        raise CheckpointError(
            f"{place} has no config.json that names its model; give the timm name and "
            f"--checkpoint {file}"
        )
    repository = _repository(name)
    if repository is None:
        return config.architecture, place
    return config.architecture, Path(f"{HUB}{repository.partition('@')[0]}@{place.name}")


def _find(checkpoint: Path) -> tuple[Path, Written | None]:
    """The file of weights that the value of --checkpoint names, and the config.json beside it."""
    place = _place(checkpoint)
    is_folder = os.path.isdir(place)
    file = _weights_in(place) if is_folder else place
    config = file.parent / "config.json"
    there = os.path.isfile(config)
    return file, read_config(config, must_be_timm=is_folder) if there else None


def _place(checkpoint: Path) -> Path:
    """The file or folder that the value of --checkpoint names; one of the hub is downloaded."""
    repository = _repository(str(checkpoint))
    if repository is not None:
        return _downloaded(repository)
    return Path(str(checkpoint).removeprefix(FOLDER))


def _repository(name: str) -> str | None:
    """The repository of the hub that a name means, perhaps with @REVISION; None for paths."""
    if os.path.exists(name):
        return None
    full = with_prefix(name)
    if full.startswith(HUB):
        return full.removeprefix(HUB)
    known, at, revision = name.partition("@")
    if not at or not is_model(architecture(known)):
        return None
    repository = f"timm/{known}"
    with suppress(RuntimeError):  # an unknown tag, which is no repository either
        config = get_pretrained_cfg(known)
        repository = (config and config.hf_hub_id) or repository
    return f"{repository}@{revision}"


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder.

    Raises:
        CheckpointError: there is none.
    """
    for name in WEIGHTS_FILES:
        if os.path.isfile(folder / name):
            return folder / name
    others = [name for name in sorted(os.listdir(folder)) if name.endswith(CHECKPOINT_SUFFIXES)]
    if len(others) == 1:
        return folder / others[0]
    found = f"only {some_of(others)}" if others else "no file of weights"
    raise CheckpointError(
        f"folder {folder} has no {WEIGHTS_FILES[0]}, but {found}; give the file of weights"
    )


def _downloaded(repository: str) -> Path:
    """The folder in the hub's cache with the config and the weights of a repository.

    Raises:
        CheckpointError: they cannot be downloaded.
    """
    name = HUB + repository
    try:
        config = Path(download_from_hf(repository, "config.json"))
        for file in WEIGHTS_FILES:
            with suppress(EntryNotFoundError):
                found = Path(download_from_hf(repository, file))
                for part in files_of(found) if file.endswith(INDEX_SUFFIX) else ():
                    download_from_hf(repository, part.name)
                return found.parent
    except CheckpointError:
        raise
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
