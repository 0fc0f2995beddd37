"""Metadata of a trained model, which its checkpoint and its ONNX file contain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self, get_args

from pydantic import TypeAdapter, ValidationError

from ricciq._version import __version__
from ricciq.convert.plan import Plan
from ricciq.data.preprocessing import InputType, Preprocessing
from ricciq.errors import RecipeError
from ricciq.quant.grid import FLOAT_BITS, Bits
from ricciq.recipe import Recipe


class Accuracy(Protocol):
    """Any object with these four numbers: measured metrics, or a part of a report."""

    @property
    def top1(self) -> float:
        """Top-1 accuracy, percent."""

    @property
    def top5(self) -> float:
        """Top-5 accuracy, percent."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats."""

    @property
    def samples(self) -> int | None:
        """Number of images it was measured on."""


@dataclass(frozen=True)
class ModelMetadata:
    """What is needed to evaluate a model. A run's checkpoint and its ONNX file both contain it.

    Attributes:
        preprocessing: size and normalization of the model's input.
        class_names: one name for each class, in the order of the logits.
        labelled: whether the names come from data; without labels they are numbers.
    """

    preprocessing: Preprocessing
    class_names: list[str]
    labelled: bool

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], file: Path) -> Self:
        """Read plain values, as they were stored.

        Args:
            values: as stored by this version or an older one; other keys are ignored.
            file: the file they come from, for error messages.

        Returns:
            The metadata.

        Raises:
            ValueError: a value is missing or damaged.
        """
        try:
            return cls(**cls._fields(values, file))
        except KeyError as error:
            raise ValueError(str(error)) from None

    @classmethod
    def _fields(cls, values: Mapping[str, Any], file: Path) -> dict[str, Any]:  # noqa: ARG003
        """The arguments of `__init__`, checked."""
        return {
            "preprocessing": Preprocessing.from_dict(values["preprocessing"]),
            "class_names": _class_names(values.get("class_names")),
            "labelled": bool(values.get("labelled", True)),
        }


@dataclass(frozen=True)
class FileMetadata(ModelMetadata):
    """What is needed to evaluate an ONNX file.

    Attributes:
        input_type: what the file takes; older files take float images and do not say so.
    """

    input_type: InputType

    @classmethod
    def _fields(cls, values: Mapping[str, Any], file: Path) -> dict[str, Any]:
        given = values.get("input", "float")
        if given not in get_args(InputType):
            raise ValueError(f"input is {given!r}")
        return {**super()._fields(values, file), "input_type": given}


@dataclass(frozen=True)
class RunMetadata(ModelMetadata):
    """What is needed to rebuild the model of a run without its data.

    Attributes:
        recipe: of the run.
        plan: which layers are discrete, and what is kept in float.
        ricciq: version of ricciq that made the run.
    """

    recipe: Recipe
    plan: Plan
    ricciq: str = __version__

    @classmethod
    def _fields(cls, values: Mapping[str, Any], file: Path) -> dict[str, Any]:
        try:
            recipe = Recipe.from_values(values["recipe"], f"the recipe in {file}")
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return {
            "recipe": recipe,
            **super()._fields(values, file),
            "plan": _plan(values["plan"]),
            "ricciq": str(values.get("ricciq", "")),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for best.safetensors; `from_dict` reads them."""
        return {
            "ricciq": self.ricciq,
            "recipe": self.recipe.model_dump(mode="json"),
            "preprocessing": self.preprocessing.to_dict(),
            "class_names": self.class_names,
            "labelled": self.labelled,
            "plan": asdict(self.plan),
        }

    def for_onnx(self, *, is_float: bool = False) -> dict[str, Any]:
        """Plain values for an ONNX file, without the plan, which the graph shows.

        Preprocessing and input are left out too: `ricciq.deploy.export.export_onnx` stores them.

        Args:
            is_float: whether the file has the float model instead of the discrete one.
        """
        bits = self.recipe.quantization
        widths: tuple[Bits | str, int] = (bits.weight_bits, bits.act_bits)
        if is_float:
            widths = (FLOAT_BITS, FLOAT_BITS)
        return {
            "ricciq": self.ricciq,
            "recipe": self.recipe.model_dump(mode="json"),
            "class_names": self.class_names,
            "labelled": self.labelled,
            "bits": dict(zip(("weights", "activations"), widths, strict=True)),
        }


def accuracy_for_onnx(measured: Accuracy) -> dict[str, Any]:
    """Plain values for an ONNX file: its accuracy with onnxruntime.

    Args:
        measured: metrics of the file.
    """
    names = ("top1", "top5", "loss", "samples")
    return {"accuracy": {name: getattr(measured, name) for name in names}}


def _class_names(names: Any) -> list[str]:
    if not (names and isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("class_names is not a list of names")
    return names


def _plan(values: Any) -> Plan:
    try:
        return TypeAdapter(Plan).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("plan", *first["loc"])))
        raise ValueError(f"{where}: {first['msg']}") from None
