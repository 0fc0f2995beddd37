"""onnxruntime sessions: open a file as users run it, predict with it, read its metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnxruntime as ort

from ricciq.deploy.onnx_file import read_model_file
from ricciq.errors import ModelError, on_one_line

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "ricciq"
"""The key of the JSON a ricciq file carries in its metadata."""

_SILENT = 4
"""Severity of fatal errors: whatever else onnxruntime has to say, it also raises."""
_LARGEST_PICTURE = 2**26
"""Numbers in a picture; one of 4096 x 4096 pixels has fewer."""


def open_session(
    path: Path, *, optimize: bool = True, threads: int = 0, save_optimized: Path | None = None
) -> ort.InferenceSession:
    """Load an ONNX file for the CPU.

    Args:
        path: the file.
        optimize: False switches every graph optimization off.
        threads: threads inside an operator; 0 leaves the choice to onnxruntime, and has them sleep
            while they wait.
        save_optimized: where to write the graph onnxruntime runs after its optimizations; its
            weights go to a file beside it.

    Raises:
        ModelError: the file is missing, unsafe, or onnxruntime does not accept it.
    """
    read_model_file(path)
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    if not threads:  # those that spin while they wait hold processors which torch's threads want
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
        # Beyond 2 GiB they would not fit into the file.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{save_optimized.name}.data"
        )
    try:
        # A fallback would try the same again, and say so on stdout.
        return ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise ModelError(
            f"onnxruntime {ort.__version__} cannot load {path} ({_reason(error)}); give an intact "
            "file of operators, opset and IR version that it knows"
        ) from None


def session_metadata(session: ort.InferenceSession, path: Path) -> dict[str, Any]:
    """What ricciq wrote into a file.

    Raises:
        ModelError: there is nothing of the kind in it.
    """
    try:
        stored = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
        json.dumps(stored, allow_nan=False)
    except (KeyError, ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict) or "preprocessing" not in stored:
        raise ModelError(
            f"{path} carries no ricciq metadata, so its preprocessing is unknown; "
            "export it with `ricciq export`"
        )
    return stored


class PictureInput(NamedTuple):
    """The one input of a vision model.

    Attributes:
        name: what the file calls it.
        size: (channels, height, width).
    """

    name: str
    size: tuple[int, int, int]


def picture_input(session: ort.InferenceSession, path: Path) -> PictureInput:
    """The input a file takes its pictures by.

    Raises:
        ModelError: it takes something else than float pictures of a fixed size.
    """
    entries = [(entry.name, entry.type, entry.shape) for entry in session.get_inputs()]
    for name, kind, shape in entries:
        size = tuple(shape[1:])
        if (
            (len(entries), kind, len(size)) == (1, "tensor(float)", 3)
            and all(isinstance(n, int) and n > 0 for n in size)
            and math.prod(size) <= _LARGEST_PICTURE
        ):
            return PictureInput(name, size)
    found = ", ".join(f"{kind} {shape}" for _, kind, shape in entries) or "nothing"
    raise ModelError(
        f"{path} takes {_shortened(found)}; give a vision model with one float input of shape "
        "(batch, channels, height, width), all but the batch fixed"
    )


def session_predictor(session: ort.InferenceSession, path: Path) -> Callable[[Tensor], Tensor]:
    """A function from (B, C, H, W) pictures to (B, classes) logits, both on the CPU.

    Raises:
        ModelError: the file takes no pictures or answers with something else than logits; or,
            later, it is called with pictures of a shape the file does not take.
    """
    import torch  # which `ricciq inspect` and `bench` do without

    name, _ = picture_input(session, path)
    kinds = [entry.type for entry in session.get_outputs()]
    if kinds != ["tensor(float)"]:
        raise ModelError(
            f"{path} answers with {_shortened(', '.join(kinds))}; give a classifier whose only "
            "output is float logits"
        )

    def predict(images: Tensor) -> Tensor:
        logits = run_session(session, name, images.cpu().numpy(), path)[0]
        if logits.ndim != 2 or len(logits) != len(images):
            raise ModelError(
                f"{path} answers {len(images)} pictures with numbers of shape {logits.shape}; "
                "give a classifier, with a row of logits for each picture"
            )
        return torch.from_numpy(logits)

    return predict


def run_session(
    session: ort.InferenceSession, name: str, pictures: np.ndarray[Any, Any], path: Path
) -> list[Any]:
    """Everything a session answers to a batch of pictures.

    Raises:
        ModelError: the file does not take them.
    """
    options = ort.RunOptions()
    options.log_severity_level = _SILENT
    try:
        answers: list[Any] = session.run(None, {name: pictures}, options)
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise ModelError(
            f"{path} does not take pictures of shape {pictures.shape} ({_reason(error)}); "
            "give pictures of the shape it was made for"
        ) from None
    return answers


def _reason(error: Exception) -> str:
    """What onnxruntime says, without where in its sources it says so."""
    text = on_one_line(error)
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:", "", text)
    return _shortened(re.sub(r"/onnxruntime_src/\S+ .*?\) ", "", text))


def _shortened(text: str) -> str:
    return text if len(text) <= 160 else text[:159] + "…"
