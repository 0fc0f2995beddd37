"""Top-1, top-5, loss and latency of a file, a run or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ricciq.data.dataset import ImageData
from ricciq.data.open import open_data
from ricciq.deploy.latency import interleave
from ricciq.errors import (
    DataError,
    DivergedError,
    GateError,
    ModelError,
    UsageError,
)
from ricciq.evaluation import Metrics, Predict, evaluating
from ricciq.evaluation import evaluate as compare_predictors
from ricciq.workflows.saved import Target, onnx_predictor, open_target


def evaluate(
    models: Mapping[str, Path | nn.Module | Predict],
    batches: Iterable[tuple[Tensor, Tensor]],
    reference: str | None = None,
) -> dict[str, Metrics]:
    """Show the same images to several models or files.

    Args:
        models: by name; an ONNX file, a run folder, a model on any device, or a function from
            (B, C, H, W) to (B, classes) logits.
        batches: images and integer targets (B,), as `ImageData.loader` gives them.
        reference: which of them agreement is counted with; by default the first.

    Returns:
        The metrics of each.

    Raises:
        DataError: there was no image, or a target is not among the classes.
        ModelError: a file cannot be opened, or a model does not answer with a row of logits an
            image.
        DivergedError: a model answers with NaN or infinite numbers.
    """
    with ExitStack() as modes:
        predictors: dict[str, Predict] = {}
        for name, model in models.items():
            if isinstance(model, nn.Module):
                modes.enter_context(evaluating(model))
                predictors[name] = _on_its_device(model)
            elif isinstance(model, Path):
                is_onnx = model.suffix == ".onnx" and not model.is_dir()
                predictors[name] = onnx_predictor(model) if is_onnx else open_target(model).predict
            else:
                predictors[name] = model
        return compare_predictors(predictors, batches, reference)


def _on_its_device(model: nn.Module) -> Predict:
    tensors = chain(model.parameters(), model.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    return lambda images: model(images.to(device))


def _check_classes(target: Target, path: Path, data: ImageData) -> None:
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
                f"{reference} prepares its images unlike {path}; compare targets of one model"
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
        data.set_pseudo_labels(data.num_classes, {"val": torch.cat(answers).numpy()})
    batches = loading()
    try:
        metrics = compare_predictors(
            predictors, batches, "target" if reference is None else "reference"
        )
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


def check_gates(
    target: Path, result: Mapping[str, Any], min_top1: float | None, min_agreement: float | None
) -> None:
    """Compare what `evaluate_target` found with the least that is asked for, in percent.

    Args:
        target: what was evaluated, for the message.
        result: of `evaluate_target`.
        min_top1: the least top-1; None asks for nothing.
        min_agreement: the least agreement with the reference.

    Raises:
        GateError: a gate is not met.
    """
    gates = (
        ("top-1", "--min-top1", result["top1"], min_top1),
        ("agreement", "--min-agreement", result.get("agreement"), min_agreement),
    )
    for name, flag, value, least in gates:
        if least is not None and value is not None and value < least:
            raise GateError(
                f"{name} of {target} is {value:.3f} %, below {flag} {least:g}; train longer or "
                "lower the gate"
            )
