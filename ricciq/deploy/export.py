"""Export to ONNX: one file, standard operators, packed weights, integer kernels."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from ricciq.data.preprocessing import InputType, Preprocessing
from ricciq.deploy.expressions import replace_placeholders
from ricciq.deploy.inputs import check_input, take_pixels
from ricciq.deploy.modules import deploy
from ricciq.deploy.onnx_file import read_model_file
from ricciq.deploy.passes import tidy
from ricciq.deploy.session import METADATA_KEY
from ricciq.errors import ModelError, RicciqError
from ricciq.evaluation import evaluating
from ricciq.layers.base import QuantLayer
from ricciq.layers.operators import OPSET
from ricciq.networks import logits_of, network_of
from ricciq.system.files import replacing

LARGEST_FILE = 2**31 - 2**24
"""Most bytes of tensors inside the file: protobuf's limit, less some room for the graph."""


def add_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Add metadata to a file that `export_onnx` wrote; the graph does not change.

    Args:
        path: the ONNX file.
        metadata: JSON values by key; a key that the file has already is replaced.

    Raises:
        ModelError: the file is missing or damaged.
        RicciqError: the disk is full or the folder cannot be written.
    """
    model = read_model_file(path)
    (entry,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    entry.value = json.dumps(json.loads(entry.value) | metadata)
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def is_exported(path: Path, metadata: Mapping[str, Any]) -> bool:
    """Whether `export_onnx` has written a file with this metadata, and perhaps more.

    Args:
        path: the ONNX file, which need not exist.
        metadata: JSON values by key.
    """
    try:
        entries = read_model_file(path).metadata_props
        stored = [json.loads(entry.value) for entry in entries if entry.key == METADATA_KEY]
    except (ModelError, ValueError):
        return False
    wanted = json.loads(json.dumps(metadata))
    return len(stored) == 1 and isinstance(stored[0], dict) and stored[0] | wanted == stored[0]


@contextmanager
def _plain_operators(model: nn.Module, size: tuple[int, int, int]) -> Iterator[None]:
    """Switch off what torch's exporter supports badly, for the duration of a block.

    These are timm's fused attention, which it takes for 4-D tensors only, and activations in place:
    a Hardswish then takes ten times as long to trace. They stay in place where that matters to the
    output, as where the result of the call is not used.

    Args:
        model: in evaluation mode, on the CPU.
        size: of its images.
    """
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    with _switched_off(model, "fused_attn"):
        before = _output(model, images)
        with _switched_off(model, "inplace"):
            after = _output(model, images)
            if before is not None and after is not None and torch.equal(before, after):
                yield
                return
        yield


@contextmanager
def _switched_off(model: nn.Module, name: str) -> Iterator[None]:
    """Set an attribute to False in the modules where it is True, for the duration of a block."""
    modules = [module for module in model.modules() if getattr(module, name, False) is True]
    for module in modules:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, name, True)


def _output(model: nn.Module, images: torch.Tensor) -> torch.Tensor | None:
    """The model's output; None if it is no tensor, or it fails, which the exporter reports."""
    try:
        output = model(images.clone())
    except RicciqError:
        raise
    except Exception:  # a model may raise anything
        return None
    return output if isinstance(output, torch.Tensor) else None


def _exportable(model: nn.Module) -> nn.Module:
    """The model as it is exported: deployed, on the CPU, without computed weights; or a copy so."""
    if any(isinstance(module, QuantLayer) for module in model.modules()):
        model = deploy(model)
    elsewhere = any(t.device.type != "cpu" for t in chain(model.parameters(), model.buffers()))
    if elsewhere or any(map(is_parametrized, model.modules())):
        model = copy.deepcopy(model).cpu().eval()  # the exporter makes operators for the CPU
    for module in filter(is_parametrized, list(model.modules())):
        kind = type(module)  # which the copy shares, and which the removal changes
        module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        for name in list(cast(nn.ModuleDict, module.parametrizations)):
            remove_parametrizations(module, name)
    return model


@contextmanager
def _returning_logits(model: nn.Module) -> Iterator[None]:
    """The model returns its logits alone, for the duration of a block."""
    handle = model.register_forward_hook(lambda _, __, output: logits_of(output))
    try:
        yield
    finally:
        handle.remove()


def _check_batch(graph: ir.Graph, name: str, batch: int | None) -> None:
    """Check that the exporter has not taken the number of images in its example for a constant."""
    shape = graph.inputs[0].shape
    if batch is None and shape is not None and isinstance(shape[0], int):
        raise ModelError(
            f"torch's ONNX exporter takes the number of images for a constant in {name}, as where "
            "its forward has len(images) in place of images.shape[0]; change that, or give batch"
        )


def export_onnx(
    model: nn.Module,
    path: Path,
    preprocessing: Preprocessing,
    metadata: Mapping[str, Any] | None = None,
    *,
    input_type: InputType = "float",
    batch: int | None = None,
) -> Path:
    """Write a float, converted or deployed model as an ONNX file.

    Args:
        model: maps (B, C, H, W) float32 to (B, classes) logits, perhaps beside other tensors. Of a
            converted model, a deployed copy is exported.
        path: the file to write; it appears once it is complete. The tensors of a model over 2 GB
            go to a second file beside it, named like it with ``.data`` appended.
        preprocessing: of the input; stored in the file.
        metadata: more JSON values to store in the file.
        input_type: what the file takes: ``"float"`` for images like the model, or ``"uint8"`` for
            their (B, H, W, C) pixels, which the file normalizes itself. Its logits are the same.
        batch: images in a call; None for any number.

    Returns:
        The path.

    Raises:
        ModelError: the model's weights are not float32, its output has no logits, or the file
            would not take batches of any size.
        UsageError: the file cannot take uint8 pixels or batches of this size.
        RicciqError: torch's exporter does not support the model, the disk is full, or the folder
            cannot be written.
    """
    check_input(preprocessing, input_type, batch)
    model = _exportable(network_of(model))
    example = torch.zeros(batch or 2, *preprocessing.input_size)
    any_batch = {0: torch.export.Dim("batch")}
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            evaluating(model),
            _returning_logits(model),
            _plain_operators(model, preprocessing.input_size),
        ):
            warnings.simplefilter("ignore")  # they are about the exporter's internals
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["logits"],
                dynamic_shapes=(any_batch if batch is None else {},),
                optimize=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise RicciqError(
            f"torch's ONNX exporter does not support {type(model).__name__} ({reason}); "
            "export another model, or report this"
        ) from error
    assert program is not None
    _check_batch(program.model.graph, type(model).__name__, batch)
    replace_placeholders(program.model.graph, model)
    first_names = {module: name for name, module in model.named_modules()}
    every_name = model.named_modules(remove_duplicate=False)
    graph_model = tidy(program.model, {name: first_names[module] for name, module in every_name})
    if input_type == "uint8":
        take_pixels(graph_model.graph, preprocessing)
    own = {"preprocessing": preprocessing.to_dict(), "input": input_type}
    stored = {**own, **(metadata or {})}
    graph_model.metadata_props[METADATA_KEY] = json.dumps(stored)
    tensors = [value.const_value for value in graph_model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    beside = f"{path.name}.data" if size > LARGEST_FILE else None
    with replacing(path) as temporary:
        ir.save(graph_model, temporary, external_data=beside)
    return path
