"""Read pickled checkpoints without running their code.

torch's restricted unpickler reads tensors and plain values. Beside these, trainers keep notes in
objects of a few well-known classes, which nobody reads here: they are replaced.
"""

from __future__ import annotations

import argparse
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from ricciq.errors import CheckpointError


class Note:
    """Takes the place of an object of these classes; what it says is dropped."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        """Take any state."""


class _Dict:
    """Makes the one kind of dict that the restricted unpickler fills, whatever its attributes."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


_NOTES = (
    # numpy's scalars and arrays, such as the best metric
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    # paths
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
    ),
    # settings of OmegaConf and Hydra
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(
        f"omegaconf.nodes.{name}Node"
        for name in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
    ),
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str")),
    # dates
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta")),
)
_DICTS = (
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)


def load_pickled(path: Path, *, mapped: bool = False) -> Any:
    """What a file of `torch.save` has; its tensors are on the CPU.

    Args:
        path: of the file.
        mapped: leave the tensors in the file until they are used, if its form allows it.

    Raises:
        CheckpointError: it is a compressed zip.
        Exception: the file is damaged, or has objects of other classes; torch raises nearly any.
    """
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_compression(path)
    stand_ins: list[Any] = [(Note, name) for name in _NOTES]
    stand_ins += [(_Dict, name) for name in _DICTS]
    with (
        torch.serialization.safe_globals([argparse.Namespace, *stand_ins]),
        warnings.catch_warnings(action="ignore"),  # what they warn about is refused later
    ):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)


def _check_compression(path: Path) -> None:
    """Refuse a compressed zip, which torch never writes: a small file could fill the memory."""
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise CheckpointError(
                f"checkpoint {path} is a compressed zip, which torch does not write; save the "
                "weights again with torch.save, or as .safetensors"
            )
