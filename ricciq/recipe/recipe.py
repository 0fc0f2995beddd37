"""A recipe: load, override, validate, save.

It is everything that decides the result of a run. Values come from the defaults, then from a YAML
file, then from command-line flags; the merged recipe is saved in the run folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from ricciq.data.augmentation import Augmentation
from ricciq.errors import RecipeError, did_you_mean
from ricciq.quant.catalog import QUANTIZERS
from ricciq.recipe.sections import (
    DataSection,
    MethodSection,
    ModelSection,
    QuantizationSection,
    Section,
    TrainingSection,
)
from ricciq.system.safe_yaml import parse_yaml

PACKAGE = Path(__file__).parent.parent
Seed = Annotated[int, Field(ge=0, lt=2**63)]
MAX_BYTES = 1_000_000
"""A recipe larger than this is not read."""


class Recipe(Section):
    """Everything that decides a run."""

    model: ModelSection = ModelSection()
    """Which network, and its float weights."""
    data: DataSection = DataSection()
    """Which images."""
    quantization: QuantizationSection = QuantizationSection()
    """Bits and quantizers."""
    method: MethodSection = MethodSection()
    """The gradient estimator."""
    training: TrainingSection = TrainingSection()
    """The fine-tuning schedule."""
    seed: Seed = 0
    """Start of everything random."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """auto, cpu, cuda or cuda:N."""
    amp: bool | None = None
    """Mixed precision; without a value, on with CUDA and off on a CPU."""
    compile: bool | None = None
    """torch.compile; without a value, on with CUDA and off on a CPU."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for key, catalog in QUANTIZERS.items() if self.training.progressive else ():
            name = getattr(self.quantization, key)
            if not catalog[name].can_change_width:
                able = next(other for other, entry in catalog.items() if entry.can_change_width)
                raise ValueError(
                    f"training.progressive changes widths, which {key} {name} cannot; take {able}"
                )
        return self

    @classmethod
    def from_values(cls, values: Mapping[str, Any], source: str = "the recipe") -> Recipe:
        """Validate plain nested values.

        Raises:
            RecipeError: the first thing that does not hold, in one sentence.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError(_sentence(error, source)) from None

    @classmethod
    def load(cls, name_or_file: str | Path) -> Recipe:
        """Read a shipped recipe by name, or any recipe file.

        Raises:
            RecipeError: it does not exist, is not YAML, or does not hold.
        """
        path = find_recipe(name_or_file)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise RecipeError(f"recipe {path} is larger than 1 MB; give a recipe file")
            values = parse_yaml(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"recipe {path} cannot be read ({error}); correct the file") from None
        if not isinstance(values, dict):
            raise RecipeError(f"recipe {path} holds no sections; write model:, data: and so on")
        return cls.from_values(values, f"recipe {path}")

    def override(self, flags: Mapping[str, Any]) -> Recipe:
        """A recipe with dotted keys replaced, as in ``{"training.lr": 1e-3}``; None is no flag."""
        given = {key: value for key, value in flags.items() if value is not None}
        return self.replace(given, "the command line")

    def replace(self, values_by_key: Mapping[str, Any], source: str) -> Recipe:
        """A recipe with dotted keys replaced, None being a value; `source` names them in errors."""
        values = self.model_dump()
        for given, value in values_by_key.items():
            key = given
            if given == "method.on" and "method.target" not in values_by_key:
                key = "method.target"  # its old name goes before what the recipe has, too
            *sections, field = key.split(".")
            part = values
            for section in sections:
                inner = part.setdefault(section, {})
                if not isinstance(inner, dict):
                    raise RecipeError(f"{source} has an unknown key {key}; remove it")
                part = inner
            part[field] = value
        return Recipe.from_values(values, source)

    def to_yaml(self) -> str:
        """The whole recipe, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def recipe_folder() -> Path:
    """Where the shipped recipes are: inside the wheel, or beside the package in a clone."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def find_recipe(name_or_file: str | Path) -> Path:
    """The file of a recipe given by shipped name or by path.

    Raises:
        RecipeError: there is none; the message has the nearest names.
    """
    shipped = shipped_recipes()
    if str(name_or_file) in shipped:
        return shipped[str(name_or_file)]
    path = Path(name_or_file)
    if os.path.isfile(path):  # Path.is_file raises where a name is too long
        return path
    hint = did_you_mean(str(name_or_file), shipped, f"there are {', '.join(shipped)}")
    raise RecipeError(f"there is no recipe {name_or_file}; {hint}")


def _sentence(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    # A union adds the alternative it tried, as in method.block.literal['row','kernel'].
    parts = takewhile(
        lambda part: "[" not in part and part != "constrained-int", map(str, first["loc"])
    )
    where = ".".join(parts)
    value = " ".join(str(first["input"]).split())[:80]
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = [*Recipe.model_fields, *Augmentation.__dataclass_fields__]
        for section in Recipe.model_fields.values():
            if isinstance(section.annotation, type) and issubclass(section.annotation, Section):
                known += section.annotation.model_fields
        hint = did_you_mean(str(first["loc"][-1]), known, "remove it", most=1)
        return f"{source} has an unknown key {where}; {hint}"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        names = re.findall(r"'(.*?)'", first["ctx"]["expected"])
        reason = did_you_mean(value, names, reason)
    return f"{source} does not hold at {where or 'its top'} = {value}: {reason}"
