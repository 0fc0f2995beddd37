"""onnxruntime sessions: open an ONNX file, predict with it, read its metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ricciq.data.preprocessing import InputType
from ricciq.deploy.onnx_file import read_model_file
from ricciq.errors import ModelError, RicciqError, on_one_line
from ricciq.system.offline import forbid_telemetry

forbid_telemetry()  # onnxruntime looks when it is imported
import onnxruntime as ort  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "ricciq"
"""Metadata key of the JSON that ricciq stores in an ONNX file."""

PIXEL_CHANNELS = (1, 3)
"""Channels of uint8 images: grey, or red, green and blue."""
LARGEST_BATCH = 2**27
"""Numbers in a batch of a fixed size; 800 images of 3 x 224 x 224 are fewer."""
_SILENT = 4
"""Log severity: only fatal errors. Other errors are raised as exceptions, too."""
_LARGEST_IMAGE = 2**26
"""Numbers in an image; 4096 x 4096 RGB pixels are fewer."""


def open_session(
    path: Path, *, optimize: bool = True, threads: int = 0, save_optimized: Path | None = None
) -> ort.InferenceSession:
    """Load an ONNX file for the CPU.

    Args:
        path: the ONNX file.
        optimize: False turns all graph optimizations off.
        threads: threads within an operator; with 0, onnxruntime chooses the number, and threads
            sleep while they wait.
        save_optimized: where to write the optimized graph; its weights go to a file beside it.

    Raises:
        ModelError: the file is missing or unsafe, or onnxruntime cannot load it.
        RicciqError: the optimized graph cannot be written.
    """
    read_model_file(path)
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    if not threads:  # spinning threads would take processors from torch's threads
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
        # A fallback would try the same again, and print so on stdout.
        return ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:  # onnxruntime's exceptions have no public base class
        if save_optimized is not None:
            open_session(path, optimize=optimize, threads=threads)  # or raises what is wrong
            folder = save_optimized.parent
            raise RicciqError(
                f"onnxruntime cannot write the unpacked weights of {path} to {folder} "
                f"({_reason(error)}); make room there, or set TMPDIR to a folder on another disk"
            ) from None
        raise ModelError(
            f"onnxruntime {ort.__version__} cannot load {path} ({_reason(error)}); give an intact "
            "file with operators, opset and IR version that it supports"
        ) from None


def session_metadata(session: ort.InferenceSession, path: Path) -> dict[str, Any]:
    """The metadata that ricciq stored in an ONNX file.

    Args:
        session: of the file.
        path: of the file, for messages.

    Raises:
        ModelError: it has none.
    """
    try:
        stored = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
        json.dumps(stored, allow_nan=False)
    except (KeyError, ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict) or "preprocessing" not in stored:
        raise ModelError(
            f"{path} has no ricciq metadata, so its preprocessing is unknown; give --mean and "
            "--std, and where needed --input-size, --crop-pct, --interpolation and --class-map, or "
            "--like RUN, or a file of `ricciq export`"
        )
    return stored


class ImageInput(NamedTuple):
    """The single input of a vision model.

    Attributes:
        name: its name in the file.
        size: (channels, height, width).
        input_type: ``"float"`` for (B, C, H, W) float32, ``"uint8"`` for (B, H, W, C) uint8.
        batch: images in a call; None for any number.
    """

    name: str
    size: tuple[int, int, int]
    input_type: InputType
    batch: int | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image, as the file takes it."""
        channels, height, width = self.size
        return self.size if self.input_type == "float" else (height, width, channels)


def image_input(
    session: ort.InferenceSession, path: Path, sides: tuple[int, int] | None = None
) -> ImageInput:
    """The input of a model that takes images.

    Args:
        session: of the file.
        path: of the file, for messages.
        sides: height and width, for a model that takes images of any size.

    Raises:
        ModelError: its input is not a batch of float or uint8 images of a fixed size.
    """
    entries = [(entry.name, entry.type, entry.shape) for entry in session.get_inputs()]
    if len(entries) == 1 and (found := _as_images(*entries[0], sides)):
        return found
    taken = ", ".join(f"{kind} {shape}" for _, kind, shape in entries) or "nothing"
    raise ModelError(
        f"{path} takes {_shortened(taken)}; give a vision model with one input, float of shape "
        "(batch, channels, height, width) or uint8 of (batch, height, width, 1 or 3), and with "
        "--input-size where its size is not fixed"
    )


def _as_images(
    name: str, kind: str, shape: Sequence[Any], sides: tuple[int, int] | None
) -> ImageInput | None:
    """An input that takes images; None for any other."""
    if sides is not None and len(shape) == 4:
        at = (1, 2) if kind == "tensor(uint8)" else (2, 3)
        given = dict(zip(at, sides, strict=True))
        shape = [given.get(i, n) if isinstance(n, str | None) else n for i, n in enumerate(shape)]
    if len(shape) != 4 or not all(isinstance(n, int) and n > 0 for n in shape[1:]):
        return None
    batch = shape[0] if isinstance(shape[0], int) else None
    numbers = math.prod(shape[1:])
    if numbers > _LARGEST_IMAGE or not (batch is None or 0 < batch * numbers <= LARGEST_BATCH):
        return None
    if kind == "tensor(float)":
        return ImageInput(name, (shape[1], shape[2], shape[3]), "float", batch)
    if kind == "tensor(uint8)" and shape[3] in PIXEL_CHANNELS:
        return ImageInput(name, (shape[3], shape[1], shape[2]), "uint8", batch)
    return None


def session_predictor(
    session: ort.InferenceSession, path: Path, sides: tuple[int, int] | None = None
) -> Callable[[Tensor], Tensor]:
    """A function from (B, C, H, W) images to (B, classes) logits, on the CPU.

    Images are float32 or uint8, as the file takes them. If it takes a fixed number, they are given
    to it in parts, the last one with black images at its end.

    The function raises a ModelError for images of a wrong shape, and if its result is not a row of
    logits for each image.

    Args:
        session: of the file.
        path: of the file, for messages.
        sides: as for `image_input`.

    Raises:
        ModelError: the model does not take images, or has other outputs than float logits.
    """
    import torch  # here, so that `ricciq inspect` and `bench` start without it

    entry = image_input(session, path, sides)
    kinds = [entry.type for entry in session.get_outputs()]
    if kinds != ["tensor(float)"]:
        raise ModelError(
            f"{path} has outputs {_shortened(', '.join(kinds))}; give a classifier whose only "
            "output is float logits"
        )

    def predict(images: Tensor) -> Tensor:
        images = images.cpu()
        if entry.input_type == "uint8" and images.dim() == 4:
            images = images.permute(0, 2, 3, 1)
        parts = torch.split(images, entry.batch or len(images))
        return torch.cat([predict_part(part) for part in parts])

    def predict_part(images: Tensor) -> Tensor:
        count = len(images)
        if entry.batch is not None and count < entry.batch:
            missing = images.new_zeros(entry.batch - count, *images.shape[1:])
            images = torch.cat([images, missing])
        logits = run_session(session, entry.name, images.numpy(), path)[0]
        if logits.ndim != 2 or len(logits) != len(images):
            raise ModelError(
                f"{path} has an output of shape {logits.shape} for {len(images)} images; "
                "give a classifier, with a row of logits for each image"
            )
        return torch.from_numpy(logits[:count])

    return predict


def run_session(
    session: ort.InferenceSession, name: str, images: np.ndarray[Any, Any], path: Path
) -> list[Any]:
    """All outputs of a session for a batch of images.

    Args:
        session: of the file.
        name: of its input.
        images: a batch, as the file takes it.
        path: of the file, for messages.

    Raises:
        ModelError: onnxruntime cannot run the model on them.
    """
    options = ort.RunOptions()
    options.log_severity_level = _SILENT
    try:
        outputs: list[Any] = session.run(None, {name: images}, options)
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise ModelError(
            f"{path} does not take images of shape {images.shape} ({_reason(error)}); "
            "give images of the shape it was made for"
        ) from None
    return outputs


def _reason(error: Exception) -> str:
    """onnxruntime's message, without the place in its sources."""
    text = on_one_line(error)
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:", "", text)
    return _shortened(re.sub(r"/onnxruntime_src/\S+ .*?\) ", "", text))


def _shortened(text: str) -> str:
    return text if len(text) <= 160 else text[:159] + "…"
