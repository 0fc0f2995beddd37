"""Evaluate models, ONNX files, runs and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ricciq.data.classes import imagenet_synsets
from ricciq.data.dataset import ImageData
from ricciq.data.open import find_again, open_to_evaluate
from ricciq.data.sources.catalog import EvaluationSplit
from ricciq.deploy.latency import interleave
from ricciq.errors import (
    DataError,
    DivergedError,
    GateError,
    ModelError,
    UsageError,
)
from ricciq.evaluation import Metrics, Predict, evaluate_with_predictions, evaluating
from ricciq.evaluation import evaluate as compare_predictors
from ricciq.system.journal import Journal
from ricciq.workflows.doubt import doubt
from ricciq.workflows.saved import NOTHING_GIVEN, Given, Target, onnx_predictor, open_target


def evaluate(
    models: Mapping[str, Path | nn.Module | Predict],
    batches: Iterable[tuple[Tensor, Tensor]],
    reference: str | None = None,
) -> dict[str, Metrics]:
    """Evaluate several models or files on the same images.

    Args:
        models: by name; an ONNX file, a run folder, a model on any device, or a function from
            (B, C, H, W) to (B, classes) logits.
        batches: images and integer targets (B,), as `ImageData.loader` gives them.
        reference: name of the model to measure agreement with; by default the first.

    Returns:
        The metrics of each, by name.

    Raises:
        DataError: there are no images, or a target is not among the classes.
        ModelError: a file cannot be opened, or a model's output is not a row of logits for each
            image.
        DivergedError: a model's output is NaN or infinite.
    """
    with ExitStack() as modes:
        predictors: dict[str, Predict] = {}
        for name, model in models.items():
            if isinstance(model, nn.Module):
                modes.enter_context(evaluating(model))
                predictors[name] = _on_its_device(model)
            elif isinstance(model, Path):
                is_onnx = model.suffix.lower() == ".onnx" and not model.is_dir()
                predictors[name] = onnx_predictor(model) if is_onnx else open_target(model).predict
            else:
                predictors[name] = model
        return compare_predictors(predictors, batches, reference)


def _on_its_device(model: nn.Module) -> Predict:
    tensors = chain(model.parameters(), model.buffers())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))
    return lambda images: model(images.to(like))


def _number_classes(data: ImageData, target: Target, source: str, journal: Journal) -> None:
    """Number the classes of the data as the outputs of a target, which are found by name.

    Outputs without names are taken in their order, or as ImageNet's if the data have its synsets.

    Args:
        data: labelled or not.
        target: has the outputs.
        source: where their names come from.
        journal: is told which outputs the classes are.

    Raises:
        DataError: a class is not among the outputs.
    """
    names, outputs = data.class_names, target.class_names
    if not data.labelled:
        data.class_names = list(outputs)
        return
    if not target.labelled:
        synsets = imagenet_synsets(len(outputs)) or []
        if set(names) <= set(synsets):
            outputs, source = synsets, "timm's list of ImageNet"
        elif len(names) == len(outputs):
            return
        elif not set(names) <= set(outputs):
            raise DataError(
                f"data {data.name} has {len(names)} classes but {source} has {len(outputs)}, which "
                "have no names; name them with --class-map FILE"
            )
    data.use_outputs(outputs, source)
    if names != outputs:
        journal.say(
            f"the {len(names)} classes of data {data.name} are found by their names among "
            f"{len(outputs)} outputs, as in {source}"
        )


def _check_classes(target: Target, path: Path, data: ImageData) -> None:
    """Check that a reference has the classes of the data.

    Raises:
        DataError: the number or a name of the classes differs.
    """
    known, given = target.class_names, data.class_names
    nameless = not (target.labelled and data.labelled)
    if known == given or (nameless and len(known) == len(given)):
        return
    difference = f"{len(given)} classes but {path} has {len(known)}"
    if len(known) == len(given):
        at = next(i for i, pair in enumerate(zip(given, known, strict=True)) if len(set(pair)) > 1)
        difference = f"{given[at]!r} as class {at} but {path} has {known[at]!r}"
    raise DataError(
        f"data {data.name} has {difference}; give data with the classes it was trained on"
    )


def evaluate_target(
    path: Path,
    data_name: str | None = None,
    data_dir: Path | None = None,
    reference: Path | None = None,
    *,
    given: Given = NOTHING_GIVEN,
    split: EvaluationSplit = "val",
    batch_size: int = 64,
    workers: int | None = None,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Metrics of a target on the validation images, as plain values.

    Args:
        path: an ONNX file, a run folder, or a checkpoint that a run wrote.
        data_name: as for --data; by default the data that the target was made with.
        data_dir: as for --data-dir.
        reference: another target, to measure agreement with.
        given: what is known about both, in place of what is stored with them.
        split: which images of the data.
        batch_size: images in a call.
        workers: processes that load images; None chooses by the machine.
        journal: shows which data are taken if none are named, and progress.

    Raises:
        UsageError: the data have no labels and there is no reference, or no data are named and
            the target does not name those it was made with.
        ModelError: a target cannot be evaluated, or the two need different preprocessing.
        InputError: a target or the data is missing or damaged, or they do not fit each other.
    """
    journal = journal or Journal()
    target = open_target(path, given)
    if data_name is None:
        if target.data is None:
            raise UsageError(f"{path} does not name the data it was made with; give --data")
        made_with, root = target.data
        data_name, data_dir = find_again(made_with, data_dir or root, path)
        journal.say(f"{data_name} is taken: the data that {path} was made with")
    data = open_to_evaluate(data_name, data_dir, split)
    for message in data.messages:
        journal.say(message)
    if not data.labelled and reference is None:
        raise UsageError(
            f"data {data_name} has no labels; give a --reference to measure agreement with"
        )
    _number_classes(data, target, str(given.class_map or given.like or path), journal)
    targets = {"target": target}
    if reference is not None:
        other = open_target(reference, given)
        _check_classes(other, reference, data)
        if other.preprocessing != target.preprocessing:
            raise ModelError(
                f"{reference} prepares its images unlike {path}; compare targets of one model"
            )
        targets["reference"] = other
    if given.preprocessing or given.like:
        journal.say(f"images are given to {path} as {target.preprocessing.brief}")
    predictors = {name: opened.predict for name, opened in targets.items()}
    loading = partial(
        data.loader,
        "val",
        target.preprocessing,
        batch_size=batch_size,
        workers=workers,
        training=False,
    )
    if not data.labelled:
        with journal.over("reference", loading()) as batches:
            answers = [predictors["reference"](images).argmax(1) for images, _ in batches]
        data.set_pseudo_labels(data.num_classes, {"val": torch.cat(answers).numpy()})
    try:
        with journal.over("evaluation", loading()) as batches:
            metrics, predictions = evaluate_with_predictions(
                predictors, batches, "target" if reference is None else "reference"
            )
    except DivergedError as error:
        both = path if reference is None else f"{path} with --reference {reference}"
        raise ModelError(f"{both} cannot be evaluated: {error}") from None
    guessed = predictions["target"].classes.numpy()
    said = doubt(guessed, data.targets("val"), data.num_classes, str(path))
    if said is not None and data.labelled and not target.labelled:  # else classes have names
        journal.say(said)
    calls = {name: partial(opened.predict, opened.blank()) for name, opened in targets.items()}
    with torch.inference_mode():
        latency = interleave(calls)
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
    """Compare the result of `evaluate_target` with the demanded minimum.

    Args:
        target: what was evaluated, for the message.
        result: from `evaluate_target`.
        min_top1: smallest acceptable top-1 in percent; None accepts any.
        min_agreement: smallest acceptable agreement with the reference, in percent.

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
