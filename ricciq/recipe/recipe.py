"""A recipe: load, override, validate, save.

It is everything that decides the result of a run. A YAML file overrides the defaults, and flags of
the command line override the file; the merged recipe is saved in the run's folder.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from ricciq.data.augmentation import Augmentation
from ricciq.errors import RecipeError, did_you_mean, listed
from ricciq.quant.catalog import QUANTIZERS
from ricciq.recipe.sections import (
    DataSection,
    MethodSection,
    ModelSection,
    QuantizationSection,
    Section,
    TrainingSection,
    WrittenForSection,
)
from ricciq.system.safe_yaml import parse_yaml

PACKAGE = Path(__file__).parent.parent
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NONE = "none"
"""The value of --recipe that stands for the plain defaults."""
MAX_BYTES = 1_000_000
"""Size of the largest recipe file that is read."""


class Recipe(Section):
    """Everything that decides the result of a run."""

    model: ModelSection = ModelSection()
    """The model and its float weights."""
    data: DataSection = DataSection()
    """The data set and its loading."""
    quantization: QuantizationSection = QuantizationSection()
    """Bits and quantizers of weights and activations."""
    method: MethodSection = MethodSection()
    """The gradient estimator."""
    training: TrainingSection = TrainingSection()
    """The fine-tuning schedule."""
    written_for: WrittenForSection = WrittenForSection()
    """The size of the data set that a shipped recipe was written for."""
    seed: Seed = 0
    """Seed of everything random."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Device to train on: auto, cpu, cuda or cuda:N."""
    amp: bool | None = None
    """Mixed precision; without a value, on for CUDA and off for CPU."""
    compile: bool | None = None
    """Use torch.compile; without a value, on for CUDA and off for CPU."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty_sections(cls, values: Any) -> Any:
        """A section whose keys are all commented out is null in YAML, and has the defaults."""
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields.items()
        sections = {key for key, field in fields if isinstance(field.default, Section)}
        return {k: value for k, value in values.items() if value is not None or k not in sections}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for key, catalog in QUANTIZERS.items() if self.training.progressive else ():
            name = getattr(self.quantization, key)
            if not catalog[name].can_change_width:
                able = next(other for other, entry in catalog.items() if entry.can_change_width)
                raise ValueError(
                    f"training.progressive changes bits, which {key} {name} does not "
                    f"support; use {able}"
                )
        return self

    @classmethod
    def from_values(cls, values: Mapping[str, Any], source: str = "the recipe") -> Recipe:
        """Validate plain nested values.

        Args:
            values: keys and values by section.
            source: where they come from, for error messages.

        Returns:
            The recipe.

        Raises:
            RecipeError: a value is invalid; the message names the first one.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError(_sentence(error, source)) from None

    @classmethod
    def load(cls, name_or_file: str | Path) -> Recipe:
        """Read a shipped recipe by name, or any recipe file.

        Raises:
            RecipeError: it does not exist, is not YAML, or is invalid.
        """
        path = find_recipe(name_or_file)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise RecipeError(f"recipe {path} is larger than 1 MB; give a smaller file")
            values = parse_yaml(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"recipe {path} cannot be read ({error}); correct the file") from None
        if not isinstance(values, dict):
            raise RecipeError(f"recipe {path} has no sections; write model:, data: and so on")
        return cls.from_values(values, f"recipe {path}")

    def gives_the_run_of(self, other: Recipe) -> bool:
        """Whether both describe the same run.

        Args:
            other: the recipe to compare with.
        """
        return not self.differences(other)

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """What makes the run of another recipe differ; the number of workers does not.

        Args:
            other: the recipe to compare with.

        Returns:
            The values here and there, by dotted key; None for a key that one of them lacks.
        """
        one, two = dict(_flat(self.model_dump())), dict(_flat(other.model_dump()))
        return {
            key: (one.get(key), two.get(key))
            for key in [*one, *(key for key in two if key not in one)]
            if key != "data.workers" and one.get(key) != two.get(key)
        }

    def override(self, flags: Mapping[str, Any]) -> Recipe:
        """A recipe with dotted keys replaced, as in ``{"training.lr": 1e-3}``; None is left out.

        Raises:
            RecipeError: as `replace`.
        """
        given = {key: value for key, value in flags.items() if value is not None}
        return self.replace(given, "the command line")

    def replace(self, values_by_key: Mapping[str, Any], source: str) -> Recipe:
        """A recipe with dotted keys replaced.

        Args:
            values_by_key: new values by dotted key; None is a value.
            source: where they come from, for error messages.

        Returns:
            The new recipe.

        Raises:
            RecipeError: a key is unknown or a value is invalid.
        """
        values = self.model_dump()
        for given, value in values_by_key.items():
            key = given
            if given == "method.on" and "method.target" not in values_by_key:
                key = "method.target"  # its old name also overrides the recipe
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


def _flat(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", value


def recipe_folder() -> Path:
    """The folder of the shipped recipes: in the package of a wheel, beside it in a clone."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def find_recipe(name_or_file: str | Path) -> Path:
    """The file of a recipe, given a shipped recipe's name or a path.

    Raises:
        RecipeError: it does not exist; the message has similar names.
    """
    shipped = shipped_recipes()
    if str(name_or_file) in shipped:
        return shipped[str(name_or_file)]
    path = Path(name_or_file)
    if os.path.isfile(path):  # Path.is_file raises where a name is too long
        return path
    known = [*shipped, NONE]
    hint = did_you_mean(str(name_or_file), known, f"there are {', '.join(known)}")
    raise RecipeError(f"there is no recipe {name_or_file}; {hint}")


def _nearest_key(unknown: str) -> str:
    """The remedy for an unknown dotted key: the key of the most similar last name."""
    keys = list(Recipe.model_fields)
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += [f"{name}.{inner}" for inner in field.annotation.model_fields]
    keys += [f"data.augmentation.{name}" for name in Augmentation.__dataclass_fields__]
    section, _, name = unknown.rpartition(".")
    if unknown in keys:  # its name itself has the dot
        return f"write {name} in the section {section}, as in {section}: {{{name}: …}}"
    names = [key.rpartition(".")[2] for key in keys]
    near = difflib.get_close_matches(name.lower(), names, 1, cutoff=0.5)
    found = [key for key in keys if key.rpartition(".")[2] in near]
    here = [key for key in found if key.rpartition(".")[0] == section]
    return f"did you mean {listed(here or found)}" if found else "remove it"


def _sentence(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    # pydantic appends the member of a union, as in method.block.literal['row','kernel'].
    parts = takewhile(
        lambda part: "[" not in part and part != "constrained-int", map(str, first["loc"])
    )
    where = ".".join(parts)
    value = " ".join(str(first["input"]).split())[:80]
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        hint = _nearest_key(where)
        return f"{source} has an unknown key {where}; {hint}"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        names = re.findall(r"'(.*?)'", first["ctx"]["expected"])
        reason = did_you_mean(value, names, reason)
    at = f" at {where} = {value}" if where else ""  # without a key, the value is the whole recipe
    return f"{source} is invalid{at}: {reason}"
