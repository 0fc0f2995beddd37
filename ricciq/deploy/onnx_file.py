"""ONNX files from strangers: parsed and checked before onnxruntime opens them.

A file may keep its weights in other files, and older versions of onnxruntime read any file that is
named there. Here, external data are not read; only where they are, and how large, is checked.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from ricciq.errors import ModelError

_LARGEST = 2**31
_VALUES_A_BYTE = 8
"""No ONNX type packs more values into a byte."""


def read_model_file(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file without reading its external data.

    Raises:
        ModelError: the file is missing or is not an ONNX file, it has fewer weights than it
            declares, or its external data are missing or outside its folder.
    """
    model = _parse(path)
    for tensor in _tensors(model):
        _check_tensor(tensor, path)
    return model


def size_with_external_data(path: Path) -> int:
    """Bytes of an ONNX file and of its external data.

    Raises:
        ModelError: as in `read_model_file`.
    """
    external = {_external_file(t, path) for t in _tensors(read_model_file(path)) if _is_external(t)}
    return sum(file.stat().st_size for file in (path, *external))


def _parse(path: Path) -> onnx.ModelProto:
    if os.path.isdir(path):  # Path.is_dir raises where a name is too long
        raise ModelError(f"{path} is a folder; give an ONNX file")
    if not os.path.isfile(path):
        raise ModelError(f"there is no model file {path}; check the path")
    try:
        if path.stat().st_size >= _LARGEST:
            raise ModelError(
                f"{path} is larger than 2 GiB, the limit of an ONNX file; give one whose weights "
                "are external data"
            )
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}); check its permissions"
        ) from None
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except Exception:  # onnx does not export protobuf's error
        raise ModelError(f"{path} is not an ONNX file, or is damaged; give an intact one") from None
    if _has_bytes_for_text(model):
        raise ModelError(f"{path} has names that are not UTF-8 text; give an intact ONNX file")
    if not model.HasField("graph"):
        raise ModelError(f"{path} has no ONNX graph; give an intact ONNX file")
    return model


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor in a message: in initializers, attributes, subgraphs and functions."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(part)


def _has_bytes_for_text(message: Any) -> bool:
    """Whether a name in a message is not UTF-8; protobuf gives it as bytes then."""
    for field, value in message.ListFields():
        parts = [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value
        if field.type == field.TYPE_STRING and any(isinstance(part, bytes) for part in parts):
            return True
        if field.type == field.TYPE_MESSAGE and any(map(_has_bytes_for_text, parts)):
            return True
    return False


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.external_data) > 0


def _check_tensor(tensor: onnx.TensorProto, path: Path) -> None:
    there = _external_bytes(tensor, path) if _is_external(tensor) else tensor.ByteSize()
    if any(n < 0 for n in tensor.dims) or math.prod(tensor.dims) > _VALUES_A_BYTE * there:
        raise ModelError(
            f"{path} declares weights {tensor.name!r} of shape {list(tensor.dims)} but has only "
            f"{there} bytes of them; give an intact file"
        )


def _external_file(tensor: onnx.TensorProto, path: Path) -> Path:
    """The file that has a tensor's data.

    Raises:
        ModelError: it is outside the folder of the model.
    """
    named = [entry.value for entry in tensor.external_data if entry.key == "location"]
    location = named[0] if len(named) == 1 else ""
    folder = Path(os.path.realpath(path.parent))
    # onnxruntime takes a location with "*" for an address in memory.
    if not location or "*" in location or "\0" in location or Path(location).is_absolute():
        file = folder
    else:
        file = Path(os.path.realpath(folder / location))
    if file == folder or not file.is_relative_to(folder):
        raise ModelError(
            f"{path} keeps weights in {location[:80]!r}, which is not a file in its folder; give a "
            "model with its external data beside it"
        )
    return file


def _external_bytes(tensor: onnx.TensorProto, path: Path) -> int:
    """Number of bytes that a tensor has in its external file."""
    file = _external_file(tensor, path)
    if not os.path.isfile(file):
        raise ModelError(
            f"{path} needs {file.name[:80]!r}, which is missing; keep the two files together"
        )
    entries = {entry.key: entry.value for entry in tensor.external_data}
    size = file.stat().st_size
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", size - offset))
    except ValueError:
        offset = length = -1
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelError(
            f"{path} needs more data than {file} has; give the two files that were written together"
        )
    return length
