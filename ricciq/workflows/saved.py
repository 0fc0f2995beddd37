"""Reopen what a run saved: its model, its ONNX file, or a function that predicts with either."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ricciq.convert.rewrite import convert
from ricciq.data.preprocessing import InputType, Preprocessing
from ricciq.deploy.links import link
from ricciq.deploy.modules import deploy
from ricciq.deploy.session import image_input, open_session, session_metadata, session_predictor
from ricciq.errors import CheckpointError, ModelError, on_one_line
from ricciq.evaluation import Predict
from ricciq.models.factory import load_model
from ricciq.runs.folder import RunFolder
from ricciq.runs.metadata import FileMetadata, ModelMetadata, RunMetadata
from ricciq.system.tensor_files import load_model_state, load_tensors

if TYPE_CHECKING:
    from ricciq.data.preprocessing import Transform


class Rebuilt(NamedTuple):
    """A trained model rebuilt from the files of its run.

    Attributes:
        model: in evaluation mode on the CPU.
        metadata: what the run stored with the weights.
    """

    model: nn.Module
    metadata: RunMetadata


def rebuild(path: Path) -> Rebuilt:
    """Open the trained model of a run folder, or of a checkpoint that a run wrote.

    Args:
        path: a run folder, or a copy of its best.safetensors.

    Returns:
        The model, converted as in the run, and its metadata.

    Raises:
        CheckpointError: the file is missing, damaged, or was not written by ricciq.
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
            input_size=metadata.preprocessing.input_size[1:],
            kwargs=recipe.model.kwargs,
        )
        # The scales are in the file, too.
        config = replace(recipe.quantization.config, search=1)
        model = convert(loaded.model, metadata.plan, config)
    except (ValueError, ModelError) as error:
        reason = on_one_line(error)
        raise CheckpointError(
            f"{file} has no valid description of its model ({reason}); give a run's "
            "best.safetensors"
        ) from None
    load_model_state(model, tensors, file)
    return Rebuilt(model.eval(), metadata)


def _weights_of(path: Path) -> Path:
    """The weights of a run folder, or the file itself."""
    return RunFolder(path).best if os.path.isdir(path) else path


def onnx_predictor(path: Path, *, optimize: bool = True) -> Predict:
    """A predictor of any ONNX classifier; metadata of ricciq are needed for uint8 pixels only.

    Args:
        path: the ONNX file.
        optimize: whether onnxruntime optimizes the graph.

    Returns:
        A function from (B, C, H, W) images to (B, classes) logits, both on the CPU.

    Raises:
        ModelError: the file is missing, damaged, or not a classifier, or takes uint8 pixels and
            does not say how images are normalized.
    """
    session = open_session(path, optimize=optimize)
    predict = session_predictor(session, path)
    if image_input(session, path).input_type == "float":
        return predict
    stored = session_metadata(session, path)
    with _reading_metadata(path):
        preprocessing = Preprocessing.from_dict(stored["preprocessing"])
    return _of_pixels(predict, preprocessing)


def _of_pixels(predict: Predict, preprocessing: Preprocessing) -> Predict:
    """A predictor of pixels that also takes normalized images."""

    def of_either(images: Tensor) -> Tensor:
        pixels = images if images.dtype == torch.uint8 else preprocessing.to_pixels(images.cpu())
        return predict(pixels)

    return of_either


class Target(NamedTuple):
    """Something to evaluate.

    Attributes:
        predict: maps (B, C, H, W) images on the CPU, normalized or as `transform` makes them, to
            (B, classes) logits.
        preprocessing: of its input.
        class_names: in the order of the logits.
        labelled: whether the class names come from data; otherwise they are numbers.
        data: the values of --data and --data-dir that it was made with, if they are known.
        input_type: what it takes; a file of uint8 pixels turns normalized images back into them.
    """

    predict: Predict
    preprocessing: Preprocessing
    class_names: list[str]
    labelled: bool
    data: tuple[str, Path | None] | None
    input_type: InputType = "float"

    def transform(self) -> Transform:
        """From an image to a tensor that `predict` takes in a batch, without converting it."""
        if self.input_type == "uint8":
            return self.preprocessing.pixel_transform()
        return self.preprocessing.evaluation_transform()

    def blank(self) -> Tensor:
        """A batch of one blank image, of the type that `transform` makes."""
        dtype = torch.uint8 if self.input_type == "uint8" else torch.float32
        return torch.zeros(1, *self.preprocessing.input_size, dtype=dtype)


def open_target(path: Path) -> Target:
    """Open an ONNX file, a run folder or a checkpoint for evaluation.

    Raises:
        ModelError: there is no such file, or the ONNX file cannot be used.
        CheckpointError: the file of a run is missing or damaged.
    """
    if not os.path.exists(path):  # Path.exists raises where a name is too long
        raise ModelError(f"{path} does not exist; give an .onnx file, a run folder or a checkpoint")
    if path.is_dir() or path.suffix.lower() != ".onnx":
        trained = rebuild(path)
        data = _data_of(trained.metadata.to_dict())
        deployed = link(deploy(trained.model), trained.metadata.preprocessing.input_size).model
        return Target(deployed, *_described(trained.metadata), data)
    session = open_session(path)
    stored = session_metadata(session, path)
    predict = session_predictor(session, path)
    with _reading_metadata(path):
        metadata = FileMetadata.from_dict(stored, path)
    taken = image_input(session, path)
    expected, classes = metadata.preprocessing.input_size, len(metadata.class_names)
    if taken.input_type == "uint8":
        predict = _of_pixels(predict, metadata.preprocessing)
    target = Target(predict, *_described(metadata), _data_of(stored), taken.input_type)
    logits = None
    if (taken.size, taken.input_type) == (expected, metadata.input_type):
        logits = predict(target.blank())
    if logits is None or logits.shape[1] != classes:
        raise ModelError(
            f"{path} has the metadata of another model, with {metadata.input_type} images of "
            f"{expected} and {classes} classes; export it again with `ricciq export`"
        )
    return target


@contextmanager
def _reading_metadata(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ModelError(
            f"{path} has damaged ricciq metadata ({error}); export it again with `ricciq export`"
        ) from None


def _data_of(stored: Mapping[str, Any]) -> tuple[str, Path | None] | None:
    """The data in stored metadata, which may be of any form: an export need not name its data."""
    recipe = stored.get("recipe")
    section = recipe.get("data") if isinstance(recipe, dict) else None
    if not isinstance(section, dict):
        return None
    name, root = section.get("name"), section.get("dir")
    if not (name and isinstance(name, str)):
        return None
    return name, Path(root) if root and isinstance(root, str) else None


def _described(metadata: ModelMetadata) -> tuple[Preprocessing, list[str], bool]:
    return metadata.preprocessing, metadata.class_names, metadata.labelled


def float_source(path: Path) -> dict[str, Any]:
    """Name and weights of a float model that a run trained, as recipe values.

    Its preprocessing is found with its weights, as that of other checkpoints.

    Raises:
        CheckpointError: the file is missing or damaged, or its model is quantized already.
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
            f"{path} has a model that is quantized already; start from a float run (--bits 32)"
        )
    recipe = metadata.recipe
    return {
        "model.name": recipe.model.name,
        "model.checkpoint": file,
        "data.input_size": recipe.data.input_size,
    }
