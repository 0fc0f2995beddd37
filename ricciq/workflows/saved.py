"""Reopen what a run saved: its model, its ONNX file, or a function that predicts with either."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ricciq.convert.rewrite import convert
from ricciq.data.classes import read_class_map
from ricciq.data.preprocessing import InputType, Preprocessing
from ricciq.deploy.links import link
from ricciq.deploy.modules import deploy
from ricciq.deploy.session import (
    PIXEL_CHANNELS,
    ImageInput,
    image_input,
    open_session,
    session_metadata,
    session_predictor,
)
from ricciq.errors import CheckpointError, ModelError, UsageError, on_one_line
from ricciq.evaluation import Predict
from ricciq.models.factory import load_model
from ricciq.recipe.sections import ModelSection
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
            as_pretrained=_built_as_pretrained(recipe.model),
            input_size=metadata.preprocessing.input_size[1:],
            kwargs=recipe.model.kwargs,
            fuse=recipe.model.fuse,
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


def _built_as_pretrained(source: ModelSection) -> bool:
    """Whether a run built its model as for pretrained weights.

    Old runs did so only without a checkpoint; newer ones say whether it is fused, and always did.
    """
    return source.pretrained if source.checkpoint is None else source.fuse is not None


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


class Given(NamedTuple):
    """What a user says about a target. It goes before what is stored with it.

    Attributes:
        preprocessing: keys of `Preprocessing`, but ``input_size`` is (height, width), and ``mean``
            and ``std`` may have one value for all channels.
        class_map: file that names the outputs.
        like: a run or a file of ricciq with the same preprocessing and classes.
    """

    preprocessing: Mapping[str, Any] = MappingProxyType({})
    class_map: Path | None = None
    like: Path | None = None

    def describe(self, stored: ModelMetadata, path: Path) -> ModelMetadata:
        """Metadata with what is given in place of what is stored.

        Args:
            stored: of the target, which decides the number of channels and of classes.
            path: of the target, for errors.

        Raises:
            UsageError: what is given does not fit the target.
            InputError: the class map, or what the target is like, cannot be used.
        """
        preprocessing, names, labelled = _described(stored)
        count, size = len(names), preprocessing.input_size
        if self.like is not None:
            like = open_target(self.like)
            preprocessing, names, labelled = like.preprocessing, like.class_names, like.labelled
            if len(names) != count:
                raise UsageError(
                    f"--like {self.like} has {len(names)} classes but {path} has {count}; give a "
                    "run of the same model"
                )
        if self.class_map is not None:
            names, labelled = read_class_map(self.class_map).outputs(count), True
        values = {**preprocessing.to_dict(), **self.preprocessing}
        values["input_size"] = (size[0], *values["input_size"][-2:])
        for key in ("mean", "std"):
            if len(values[key]) == 1:
                values[key] = tuple(values[key]) * size[0]
        try:
            preprocessing = Preprocessing.from_dict(values)
        except ValueError as error:
            raise UsageError(
                f"{path} takes images of {size}, but the {error}; correct it"
            ) from None
        if preprocessing.input_size != size:
            raise UsageError(
                f"{path} takes images of {size}, not of {preprocessing.input_size}; give this size"
            )
        return ModelMetadata(preprocessing, names, labelled)


NOTHING_GIVEN = Given()


def open_target(path: Path, given: Given = NOTHING_GIVEN) -> Target:
    """Open an ONNX file, a run folder or a checkpoint for evaluation.

    Args:
        path: the file or folder.
        given: what is known about it; an ONNX file of another tool needs mean and deviation, unless
            it takes pixels.

    Raises:
        ModelError: there is no such file, or the ONNX file cannot be used.
        CheckpointError: the file of a run is missing or damaged.
        UsageError: what is given does not fit.
        DataError: the class map cannot be used.
    """
    if not os.path.exists(path):  # Path.exists raises where a name is too long
        raise ModelError(f"{path} does not exist; give an .onnx file, a run folder or a checkpoint")
    if path.is_dir() or path.suffix.lower() != ".onnx":
        trained = rebuild(path)
        metadata = given.describe(trained.metadata, path)
        deployed = link(deploy(trained.model), metadata.preprocessing.input_size).model
        return Target(deployed, *_described(metadata), _data_of(trained.metadata.to_dict()))
    session, sides = open_session(path), given.preprocessing.get("input_size")
    predict = session_predictor(session, path, sides)
    taken = image_input(session, path, sides)
    try:
        stored = session_metadata(session, path)
    except ModelError:  # another tool wrote it
        knows = given.like or {"mean", "std"} <= given.preprocessing.keys()
        if not knows and taken.input_type == "float":
            raise
        stored = _of_another_tool(taken, predict, path)
    with _reading_metadata(path):
        in_file = FileMetadata.from_dict(stored, path)
    expected, classes = in_file.preprocessing.input_size, len(in_file.class_names)
    logits = None
    if (taken.size, taken.input_type) == (expected, in_file.input_type):
        logits = predict(_blank(taken))
    if logits is None or logits.shape[1] != classes:
        raise ModelError(
            f"{path} has the metadata of another model, with {in_file.input_type} images of "
            f"{expected} and {classes} classes; export it again with `ricciq export`"
        )
    metadata = given.describe(in_file, path)
    if taken.input_type == "uint8":
        predict = _of_pixels(predict, metadata.preprocessing)
    return Target(predict, *_described(metadata), _data_of(stored), taken.input_type)


def _blank(taken: ImageInput) -> Tensor:
    """A batch of one blank image."""
    dtype = torch.uint8 if taken.input_type == "uint8" else torch.float32
    return torch.zeros(1, *taken.size, dtype=dtype)


def _of_another_tool(taken: ImageInput, predict: Predict, path: Path) -> dict[str, Any]:
    """Metadata of a file that has none, as far as it can be known: pixels are taken as they are.

    Raises:
        ModelError: its images have a number of channels that is neither grey nor colour.
    """
    channels = taken.size[0]
    if channels not in PIXEL_CHANNELS:
        raise ModelError(
            f"{path} takes images of {channels} channels in the shape {taken.shape}; give a model "
            "of (batch, 1 or 3 channels, height, width)"
        )
    classes = predict(_blank(taken)).shape[1]
    return {
        "preprocessing": {"input_size": taken.size, "mean": [0] * channels, "std": [1] * channels},
        "class_names": [str(number) for number in range(classes)],
        "labelled": False,
        "input": taken.input_type,
    }


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
    try:
        _, stored = load_tensors(file)
        metadata = RunMetadata.from_dict(stored, file)
    except (ValueError, CheckpointError) as error:
        if isinstance(error, CheckpointError) and not os.path.isfile(path):
            raise  # the folder of a run without weights, or with damaged ones
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
