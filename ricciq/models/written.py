"""What is written with float weights: arguments of the model, preprocessing and class names.

timm writes it to the config.json of a folder or a hub repository, and to the ``args`` of a training
checkpoint; ricciq writes it to the metadata of a run's weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from timm.models._hub import load_model_config_from_path

from ricciq.data.classes import unnamed
from ricciq.errors import CheckpointError, on_one_line
from ricciq.models.pickled import load_pickled
from ricciq.system.tensor_files import METADATA_KEY

MOST_CONFIG_BYTES = 10_000_000
"""Size of the largest config.json that is read; one for 21,841 classes has 2 MB."""
MOST_CLASSES = 1_000_000
"""Largest number of classes that a config.json may name."""
_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")

_FLAGS = {"gp": "global_pool", "bn_eps": "bn_eps"}
"""Flags of timm's training script that decide what a model computes, and their arguments."""


class Written(NamedTuple):
    """What is written with weights; by default nothing.

    Attributes:
        path: of the file that says it.
        architecture: timm's name of the model; empty if it is not written.
        arguments: of timm's constructor, without the number of classes and channels.
        preprocessing: a part of the keys of `Preprocessing`.
        class_names: in the order of the logits; None if they are not written.
        num_classes: their number as config.json has it, 0 for an encoder; None if it is not there.
        is_quantized: whether a run of ricciq quantized the model.
    """

    path: Path = Path()
    architecture: str = ""
    arguments: Mapping[str, Any] = {}
    preprocessing: Mapping[str, Any] = {}
    class_names: list[str] | None = None
    num_classes: int | None = None
    is_quantized: bool = False


def read_config(path: Path, must_be_timm: bool) -> Written | None:
    """Read a config.json; None if it is not one of timm.

    Args:
        path: of the file.
        must_be_timm: whether a file of another form is an error.

    Raises:
        CheckpointError: the file is damaged, or not one of timm although it must be.
    """
    try:
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise ValueError("it is larger than 10 MB")
        config, named, arguments = load_model_config_from_path(path.parent)
        if not isinstance(named, str):
            raise TypeError("its architecture is no name")
        arguments = _built_with(arguments)
        known = _known(config)
        if (size := arguments.pop("img_size", None)) is not None:  # of which the model was built
            known["input_size"] = (3, size, size) if isinstance(size, int) else (3, *size)
        classes = config.get("num_classes")
        names = _label_names(config.get("label_names"), classes)
        return Written(path, named, arguments, known, names, classes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if not must_be_timm:
            return None
        reason = on_one_line(f"{type(error).__name__}: {error}", 160)
        raise CheckpointError(
            f"{path} is not a config.json as timm writes it ({reason}); give the file of weights "
            "instead of the folder"
        ) from None


def read_written_in(file: Path) -> Written:
    """What weights of a run of ricciq, or a training checkpoint of timm, say of themselves.

    Args:
        file: of weights that can be read; those of other tools say nothing.
    """
    try:
        if file.suffix.lower() == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return _of_run(json.loads((tensors.metadata() or {}).get(METADATA_KEY, "{}")), file)
        return _of_training(load_pickled(file, mapped=True).get("args"), file)
    except (
        SafetensorError,
        OSError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        UnpicklingError,
    ):
        return Written(file)  # other tools have other metadata, and a state dict may have no get


def _of_run(stored: Mapping[str, Any], file: Path) -> Written:
    """What the metadata of a run of ricciq says."""
    names = stored.get("class_names") if stored.get("labelled", True) else None
    return Written(
        file,
        arguments=_built_with(stored.get("recipe", {}).get("model", {}).get("kwargs", {})),
        preprocessing=_known(stored.get("preprocessing", {})),
        class_names=_label_names(names, None),
        is_quantized=bool(stored.get("plan", {}).get("layers")),
    )


def _of_training(arguments: Any, file: Path) -> Written:
    """What the arguments of timm's training script say."""
    if not isinstance(arguments, argparse.Namespace):
        return Written(file)
    values = {key: value for key, value in vars(arguments).items() if value not in (None, "")}
    side = values.get("img_size")
    if side is not None:
        values.setdefault("input_size", (3, side, side))
    given = values.get("model_kwargs")
    built = _built_with(given if isinstance(given, dict) else {})
    built |= {name: values[flag] for flag, name in _FLAGS.items() if flag in values}
    return Written(file, arguments=built, preprocessing=_known(values))


def _built_with(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of timm's constructor, as JSON has them, without those that the data decide."""
    plain: dict[str, Any] = json.loads(json.dumps(arguments, default=lambda _: None))
    return {k: v for k, v in plain.items() if k not in ("num_classes", "in_chans")}


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in _KEYS if values.get(key) is not None}


def _label_names(names: Any, num_classes: int | None) -> list[str] | None:
    """timm's label_names as a list: they may be a mapping from index to name, with gaps.

    See `unnamed` for a class without a name.

    Raises:
        ValueError: they are no names, or not as many as classes.
    """
    if names is None:
        return None
    if isinstance(names, Mapping):
        by_index = {int(index): name for index, name in names.items()}
        size = len(by_index) if num_classes is None else num_classes
        if size > MOST_CLASSES:
            raise ValueError(f"num_classes is {size}")
        names = [by_index.pop(index, unnamed(index)) for index in range(size)]
        if by_index:
            raise ValueError(f"label_names has index {min(by_index)}, for {size} classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("label_names is not a list of names")
    if num_classes not in (None, len(names)):
        raise ValueError(f"label_names has {len(names)} names for {num_classes} classes")
    return names
