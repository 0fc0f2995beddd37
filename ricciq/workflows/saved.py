"""What a run left behind, opened again: its model, its ONNX file, or a predictor for either."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ricciq.convert.rewrite import convert
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.modules import deploy
from ricciq.deploy.session import open_session, picture_input, session_metadata, session_predictor
from ricciq.errors import (
    CheckpointError,
    ModelError,
    on_one_line,
)
from ricciq.evaluation import Predict
from ricciq.models.factory import load_model
from ricciq.runs.folder import RunFolder
from ricciq.runs.metadata import ModelMetadata, RunMetadata
from ricciq.system.tensor_files import load_model_state, load_tensors


class Rebuilt(NamedTuple):
    """A trained model rebuilt from what its run saved."""

    model: nn.Module
    metadata: RunMetadata


def rebuild(path: Path) -> Rebuilt:
    """Open the trained model of a run folder, or of a checkpoint file a run wrote.

    Args:
        path: a run folder, or its best.safetensors wherever it was copied.

    Returns:
        The model in evaluation mode on the CPU, converted where the run converted it.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of ours.
    """
    file = _weights_of(path)
    tensors, stored = load_tensors(file)
    try:
        metadata = RunMetadata.from_dict(stored, file)
        recipe = metadata.recipe
        loaded = load_model(
            recipe.model.name,
            num_classes=len(metadata.class_names),
            channels=metadata.preprocessing.input_size[0],
            checkpoint=None,
            pretrained=False,
            input_size=recipe.data.input_size,
        )
        model = convert(loaded.model, metadata.plan, recipe.quantization.config)
    except (ValueError, ModelError) as error:
        reason = on_one_line(error)
        raise CheckpointError(
            f"{file} does not say how to rebuild its model ({reason}); give a run's "
            "best.safetensors"
        ) from None
    load_model_state(model, tensors, file)
    return Rebuilt(model.eval(), metadata)


def _weights_of(path: Path) -> Path:
    """The file of a run folder's weights, or the file itself."""
    return RunFolder(path).best if os.path.isdir(path) else path


def onnx_predictor(path: Path, *, optimize: bool = True) -> Predict:
    """Logits of an ONNX file, which needs no metadata for it.

    Args:
        path: of the file.
        optimize: let onnxruntime optimize the graph.

    Returns:
        A function from (B, C, H, W) images to (B, classes) logits, both on the CPU.

    Raises:
        ModelError: the file is missing, damaged or no classifier.
    """
    return session_predictor(open_session(path, optimize=optimize), path)


class Target(NamedTuple):
    """Something that can be evaluated.

    Attributes:
        predict: (B, C, H, W) on the CPU -> (B, classes) logits.
        preprocessing: what its pictures must look like.
        class_names: in the order of the logits.
        labelled: whether these are names that data gave, and not just numbers.
    """

    predict: Predict
    preprocessing: Preprocessing
    class_names: list[str]
    labelled: bool


def open_target(path: Path) -> Target:
    """Open an ONNX file, a run folder or a checkpoint for evaluation.

    Raises:
        ModelError: there is nothing of the kind, or the ONNX file is not usable.
        CheckpointError: a run's file is damaged.
    """
    if not os.path.exists(path):  # Path.exists raises where a name is too long
        raise ModelError(f"there is no {path}; give an .onnx file, a run folder or a checkpoint")
    if path.is_dir() or path.suffix.lower() != ".onnx":
        trained = rebuild(path)
        return Target(deploy(trained.model), *_described(trained.metadata))
    session = open_session(path)
    stored = session_metadata(session, path)
    predict = session_predictor(session, path)
    try:
        metadata = ModelMetadata.from_dict(stored, path)
    except ValueError as error:
        raise ModelError(
            f"{path} has damaged ricciq metadata ({error}); export it again with `ricciq export`"
        ) from None
    expected, classes = metadata.preprocessing.input_size, len(metadata.class_names)
    size, answer = picture_input(session, path).size, None
    if size == expected:
        answer = predict(torch.zeros(1, *size))
    if answer is None or answer.shape[1] != classes:
        raise ModelError(
            f"{path} has metadata of another model, with pictures of {expected} "
            f"and {classes} classes; export it again with `ricciq export`"
        )
    return Target(predict, *_described(metadata))


def _described(metadata: ModelMetadata) -> tuple[Preprocessing, list[str], bool]:
    return metadata.preprocessing, metadata.class_names, metadata.labelled


def float_source(path: Path) -> dict[str, Any]:
    """Name, weights and input size of a float model that a run trained, as recipe values.

    Raises:
        CheckpointError: the run's model is discrete already.
    """
    file = _weights_of(path)
    _, stored = load_tensors(file)
    try:
        metadata = RunMetadata.from_dict(stored, file)
    except ValueError:
        raise CheckpointError(
            f"{file} does not name its model; give the timm name and --checkpoint {file}"
        ) from None
    if metadata.plan.layers:
        raise CheckpointError(
            f"{path} holds a model that is discrete already; start from a float one (--bits 32)"
        )
    recipe = metadata.recipe
    return {
        "model.name": recipe.model.name,
        "model.checkpoint": file,
        "data.input_size": recipe.data.input_size,
    }
