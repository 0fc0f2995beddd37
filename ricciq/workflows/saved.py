"""What a run left behind, opened again: its model, its ONNX file, or a predictor for either."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from ricciq.convert.plan import Plan
from ricciq.convert.rewrite import convert
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.modules import deploy
from ricciq.deploy.session import open_session, picture_input, session_metadata, session_predictor
from ricciq.errors import (
    CheckpointError,
    ModelError,
    RecipeError,
    on_one_line,
)
from ricciq.evaluation import Predict
from ricciq.models.factory import load_model
from ricciq.recipe import Recipe
from ricciq.runs.folder import RunFolder
from ricciq.system.tensor_files import load_model_state, load_tensors


class Rebuilt(NamedTuple):
    """A trained model rebuilt from what its run saved."""

    model: nn.Module
    recipe: Recipe
    preprocessing: Preprocessing
    about: dict[str, Any]


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
    tensors, about = load_tensors(file)
    try:
        recipe = Recipe.from_values(about["recipe"], f"the recipe in {file}")
        preprocessing = Preprocessing.from_dict(about["preprocessing"])
        plan = _plan(about["plan"])
        loaded = load_model(
            recipe.model.name,
            num_classes=len(_class_names(about)),
            channels=preprocessing.input_size[0],
            checkpoint=None,
            pretrained=False,
            input_size=recipe.data.input_size,
        )
        model = convert(loaded.model, plan, recipe.quantization.kinds)
    except (KeyError, ValueError, RecipeError, ModelError) as error:
        reason = on_one_line(error)
        raise CheckpointError(
            f"{file} does not say how to rebuild its model ({reason}); give a run's "
            "best.safetensors"
        ) from None
    load_model_state(model, tensors, file)
    return Rebuilt(model.eval(), recipe, preprocessing, about)


def _weights_of(path: Path) -> Path:
    """The file of a run folder's weights, or the file itself."""
    return RunFolder(path).best if os.path.isdir(path) else path


def _plan(values: Any) -> Plan:
    """A plan from plain values.

    Raises:
        ValueError: something in it is of another type.
    """
    try:
        return TypeAdapter(Plan).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("plan", *first["loc"])))
        raise ValueError(f"{where}: {first['msg']}") from None


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
        about = trained.about
        return Target(
            deploy(trained.model),
            trained.preprocessing,
            about["class_names"],
            about.get("labelled", True),
        )
    session = open_session(path)
    about = session_metadata(session, path)
    predict = session_predictor(session, path)
    try:
        preprocessing = Preprocessing.from_dict(about["preprocessing"])
        names = _class_names(about)
    except ValueError as error:
        raise ModelError(
            f"{path} has damaged ricciq metadata ({error}); export it again with `ricciq export`"
        ) from None
    size, answer = picture_input(session, path).size, None
    if size == preprocessing.input_size:
        answer = predict(torch.zeros(1, *size))
    if answer is None or answer.shape[1] != len(names):
        raise ModelError(
            f"{path} has metadata of another model, with pictures of {preprocessing.input_size} "
            f"and {len(names)} classes; export it again with `ricciq export`"
        )
    return Target(predict, preprocessing, names, about.get("labelled", True))


def _class_names(about: Mapping[str, Any]) -> list[str]:
    """The class names in a file's metadata.

    Raises:
        ValueError: there are none.
    """
    names = about.get("class_names")
    if not (names and isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("class_names that are no list of names")
    return names


def float_source(path: Path) -> dict[str, Any]:
    """Name, weights and input size of a float model that a run trained, as recipe values.

    Raises:
        CheckpointError: the run's model is discrete already.
    """
    file = _weights_of(path)
    _, about = load_tensors(file)
    try:
        recipe, layers = about["recipe"], about["plan"]["layers"]
        name, size = str(recipe["model"]["name"]), recipe["data"]["input_size"]
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{file} does not name its model; give the timm name and --checkpoint {file}"
        ) from None
    if layers:
        raise CheckpointError(
            f"{path} holds a model that is discrete already; start from a float one (--bits 32)"
        )
    return {"model.name": name, "model.checkpoint": file, "data.input_size": size}
