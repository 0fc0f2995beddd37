"""The state of a run in one safetensors file, saved atomically and restored exactly.

Tensors are stored under dotted names (``model.…``, ``optimizer.…``); everything else is JSON in the
file's metadata. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ricciq.errors import CheckpointError, on_one_line
from ricciq.system.files import write_atomically

METADATA_KEY = "ricciq"


class State(NamedTuple):
    """A state as read from a file.

    Attributes:
        tensors: by name.
        metadata: the JSON values.
        path: of the file, for error messages.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    path: Path


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    previous: Path | None = None,
) -> None:
    """Write tensors and JSON metadata to one file, atomically.

    Args:
        path: of the file.
        tensors: by name.
        metadata: values that JSON can represent.
        previous: path to rename the old file to; None discards it.

    Raises:
        RicciqError: the disk is full or the folder cannot be written.
    """
    # Clones: two layers may share a quantizer, and safetensors refuses shared memory.
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(whole, {METADATA_KEY: json.dumps(metadata)}), previous)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_tensors` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or not written by ricciq.
    """
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        raise CheckpointError(f"there is no checkpoint {path}; check the path")
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA_KEY])
            if not isinstance(metadata, dict):
                raise ValueError("its metadata is not a mapping")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # safetensors raises an AttributeError for a dtype that torch lacks.
    except (
        SafetensorError,
        OSError,
        KeyError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = on_one_line(error)
        raise CheckpointError(
            f"{path} is not an intact checkpoint of ricciq ({reason}); give a file that a run wrote"
        ) from None
    return tensors, metadata


def check_finite(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Refuse NaN, and infinity except where the model itself has it, as in an open bound.

    Args:
        tensors: of the file, checked in float32, the dtype in which they are used.
        own: tensors of the model before loading.
        path: of the file, for error messages.

    Raises:
        CheckpointError: a tensor is not finite; the message names it.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        # Flat, since arithmetic on a tensor of a million dimensions takes hours.
        wide = tensor.reshape(-1).float()
        if wide.isfinite().all():
            continue
        open_bound = name in own and torch.equal(wide.isinf(), own[name].reshape(-1).isinf())
        if not open_bound or wide.isnan().any():
            raise CheckpointError(
                f"checkpoint {path} has NaN or infinity in {name!r}; give one with finite weights"
            )


def load_model_state(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load a complete state into a model of the same structure.

    Args:
        model: the model to change.
        tensors: its state dict.
        path: of the file they were read from, for error messages.

    Raises:
        CheckpointError: names or shapes differ, or a tensor is not finite.
    """
    check_finite(tensors, model.state_dict(), path)
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        reason = on_one_line(error, 200)
        raise CheckpointError(
            f"{path} does not fit the model of the recipe ({reason}); give the file of this run, "
            "or start a run that another version of ricciq began again with --overwrite"
        ) from None


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything needed to resume training.

    It has no state of random generators: a step's randomness follows from the seed and its number.

    Args:
        model: the model in training.
        optimizer: its optimizer.
        progress: values that JSON can represent.

    Returns:
        The tensors and the metadata, for `save_tensors`.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    stored = _without_tensors(optimizer.state_dict(), "optimizer", tensors)
    metadata = {"progress": dict(progress), "optimizer": stored}
    return tensors, metadata


def restore_training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: State
) -> dict[str, Any]:
    """Load a state that `training_state` made.

    Args:
        model: the model to change.
        optimizer: the optimizer to change.
        state: as read from a file.

    Returns:
        The progress that was saved with it.

    Raises:
        CheckpointError: the file is damaged or belongs to another recipe.
    """
    tensors, metadata, path = state
    part = "model."
    weights = {name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)}
    load_model_state(model, weights, path)
    check_finite({n: t for n, t in tensors.items() if not n.startswith(part)}, {}, path)
    try:
        stored = _with_tensors(metadata["optimizer"], tensors)
        stored["state"] = {int(index): values for index, values in stored["state"].items()}
        optimizer.load_state_dict(stored)
        _lay_out_as_parameters(optimizer)
        progress: dict[str, Any] = metadata["progress"]
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise CheckpointError(
            f"{path} is not the state of this run ({error}); start again with --overwrite"
        ) from None
    return progress


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the memory format of their parameter: fused optimizers need it."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors are moved into ``tensors``, and their names take their place."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {str(k): _without_tensors(v, f"{name}.{k}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_without_tensors(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_without_tensors`, except that the keys of mappings are text."""
    if isinstance(value, list):
        return [_with_tensors(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tensor"}:
        return tensors[value["tensor"]]
    if value.keys() == {"dtype"}:
        dtype = getattr(torch, value["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{value['dtype']} is not a dtype")
        return dtype
    if value.keys() == {"tuple"}:
        return tuple(_with_tensors(v, tensors) for v in value["tuple"])
    return {k: _with_tensors(v, tensors) for k, v in value.items()}
