"""onnxruntime sessions: open a file as users run it, predict with it, read its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from ricciq.errors import ModelError

METADATA_KEY = "ricciq"
"""The key of the JSON a ricciq file carries in its metadata."""


def open_session(
    path: Path, *, optimize: bool = True, threads: int = 0, save_optimized: Path | None = None
) -> ort.InferenceSession:
    """Load an ONNX file for the CPU.

    Args:
        path: the file.
        optimize: False switches every graph optimization off.
        threads: threads inside an operator; 0 leaves the choice to onnxruntime.
        save_optimized: where to write the graph onnxruntime runs after its optimizations.

    Raises:
        ModelError: the file is missing or onnxruntime does not accept it.
    """
    if not path.is_file():
        raise ModelError(f"there is no model file {path}; check the path")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings concern graphs saved for other machines
    options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"onnxruntime cannot load {path} ({reason}); give an intact ONNX file"
        ) from None


def session_metadata(session: ort.InferenceSession, path: Path) -> dict[str, Any]:
    """What ricciq wrote into a file.

    Raises:
        ModelError: there is nothing of the kind in it.
    """
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    try:
        stored = json.loads(text or "")
    except ValueError:
        stored = None
    if not isinstance(stored, dict) or "preprocessing" not in stored:
        raise ModelError(
            f"{path} carries no ricciq metadata, so its preprocessing is unknown; "
            "export it with `ricciq export`"
        )
    return stored


def session_predictor(session: ort.InferenceSession, path: Path) -> Callable[[Tensor], Tensor]:
    """A function from (B, C, H, W) pictures to (B, classes) logits, both on the CPU.

    Raises:
        ModelError: when called with pictures of a shape the file does not take.
    """
    name = session.get_inputs()[0].name

    def predict(images: Tensor) -> Tensor:
        try:
            (logits,) = session.run(None, {name: images.cpu().numpy()})
        except Exception as error:  # onnxruntime's exceptions share no public base
            reason = " ".join(str(error).split())[:160]
            raise ModelError(
                f"{path} does not take pictures of shape {tuple(images.shape)} ({reason}); "
                "give the data it was made for"
            ) from None
        return torch.from_numpy(logits)

    return predict
