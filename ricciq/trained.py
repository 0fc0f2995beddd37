"""What a run left behind, opened again: its model, its ONNX file, or a predictor for either."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from ricciq.convert.plan import Plan
from ricciq.convert.rewrite import convert
from ricciq.data.dataset import PictureData
from ricciq.data.open import open_data
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.export import accuracy_in_onnx, export_onnx, stored_in_onnx
from ricciq.deploy.latency import interleave
from ricciq.deploy.modules import deploy, in_float_operators
from ricciq.deploy.session import open_session, picture_input, session_metadata, session_predictor
from ricciq.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    ModelError,
    RecipeError,
    UsageError,
    on_one_line,
)
from ricciq.evaluation import Predict, evaluate
from ricciq.models.factory import load_model
from ricciq.recipe import Recipe
from ricciq.report.schema import load_report
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
    if path.is_dir() or path.suffix != ".onnx":
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


def export_run(
    path: Path, output: Path | None = None, *, as_float: bool = False, dry_run: bool = False
) -> Path:
    """Write the ONNX file of a run again, with the accuracy its report tells of it.

    Args:
        path: a run folder or a checkpoint file a run wrote.
        output: the file to write; by default model.onnx (or model-float.onnx) beside the weights.
        as_float: write float operators and float weights that hold the discrete values.
        dry_run: open the run, and write nothing.

    Returns:
        The file.

    Raises:
        CheckpointError: the run has no usable best.safetensors.
        InputError: its report.json is damaged.
        UsageError: the run's folder is in use, the checkpoint is in none and `output` is None, or
            the folder of `output` does not exist.
    """
    trained = rebuild(path)
    model = deploy(trained.model)
    folder = RunFolder(path if path.is_dir() else path.parent)
    stored = stored_in_onnx(trained.about)
    if as_float:
        in_float_operators(model)
    elif folder.is_finished and path in (folder.path, folder.best):
        stored |= accuracy_in_onnx(load_report(folder.report).onnx.model_dump())
    if output is None and not folder.is_ours:
        raise UsageError(f"{path} lies in no folder of a run; give --output and the file to write")
    written = output or (folder.onnx_in_float if as_float else folder.onnx)
    if not os.path.isdir(written.parent):
        raise UsageError(f"there is no folder {written.parent}; make it or give another --output")
    if dry_run:
        return written
    with nullcontext() if output else folder.locked():
        return export_onnx(model, written, trained.preprocessing, stored)


def _check_classes(target: Target, path: Path, data: PictureData) -> None:
    """Refuse data whose classes a target does not know.

    Raises:
        DataError: their number or a name differs.
    """
    known, given = target.class_names, data.class_names
    nameless = not (target.labelled and data.labelled)
    if known == given or (nameless and len(known) == len(given)):
        return
    difference = f"{len(given)} classes but {path} knows {len(known)}"
    if len(known) == len(given):
        at = next(i for i, pair in enumerate(zip(given, known, strict=True)) if len(set(pair)) > 1)
        difference = f"{given[at]!r} as class {at} but {path} knows {known[at]!r}"
    raise DataError(f"data {data.name} has {difference}; give the data it was made for")


def evaluate_target(
    path: Path,
    data_name: str,
    data_dir: Path | None,
    reference: Path | None = None,
    *,
    batch_size: int = 64,
    workers: int = 0,
) -> dict[str, Any]:
    """Metrics of a target on validation data, as plain values.

    Args:
        path: an ONNX file, a run folder or a checkpoint a run wrote.
        data_name: as for --data.
        data_dir: as for --data-dir.
        reference: another target to count agreement with.
        batch_size: pictures in a call.
        workers: processes that load pictures.

    Raises:
        InputError: a target or the data is missing, damaged, or they do not fit each other.
    """
    target = open_target(path)
    data = open_data(data_name, data_dir)
    if not data.labelled:
        if reference is None:
            raise UsageError(
                f"data {data_name} has no labels; give --reference and what to agree with"
            )
        data.class_names = list(target.class_names)
    _check_classes(target, path, data)
    predictors = {"target": target.predict}
    if reference is not None:
        other = open_target(reference)
        _check_classes(other, reference, data)
        if other.preprocessing != target.preprocessing:
            raise ModelError(
                f"{reference} prepares its pictures unlike {path}; compare targets of one model"
            )
        predictors["reference"] = other.predict
    loading = partial(
        data.loader,
        "val",
        target.preprocessing,
        batch_size=batch_size,
        workers=workers,
        training=False,
    )
    if not data.labelled:
        answers = [predictors["reference"](images).argmax(1) for images, _ in loading()]
        data.set_answers(data.num_classes, {"val": torch.cat(answers).numpy()})
    batches = loading()
    try:
        metrics = evaluate(predictors, batches, "target" if reference is None else "reference")
    except DivergedError as error:
        both = path if reference is None else f"{path} with --reference {reference}"
        raise ModelError(f"{both} cannot be evaluated: {error}") from None
    picture = torch.zeros(1, *target.preprocessing.input_size)
    with torch.inference_mode():
        latency = interleave({name: partial(p, picture) for name, p in predictors.items()})
    found = metrics["target"]
    result: dict[str, Any] = {
        "target": str(path),
        "data": data_name,
        "top1": found.top1,
        "top5": found.top5,
        "loss": found.loss,
        "samples": found.samples,
        "labelled": data.labelled,
        "latency_ms": latency["target"].median,
    }
    if reference is not None:
        result |= {
            "reference": str(reference),
            "reference_top1": metrics["reference"].top1,
            "reference_latency_ms": latency["reference"].median,
            "agreement": found.agreement,
            "max_abs_diff": found.max_abs_diff,
        }
    return result
