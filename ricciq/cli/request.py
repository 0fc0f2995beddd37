"""What a command line asks for, as a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ricciq.cli import options
from ricciq.data.sources.catalog import forms
from ricciq.errors import UsageError

if TYPE_CHECKING:
    from ricciq.recipe import Recipe


def requested_recipe(
    model: str,
    checkpoint: Path | None,
    name: str | None,
    widths: tuple[str | None, str | None, str | None, str | None],
    flags: dict[str, Any],
) -> tuple[Recipe, list[str]]:
    """Defaults, then the recipe of that name or file, then flags; and what there is to say.

    Args:
        model: a timm name, or a run's folder or file.
        checkpoint: float weights; none where ``model`` has its own.
        name: of a shipped recipe, or a file.
        widths: --bits, --weight-bits, --act-bits and --max-bytes as typed.
        flags: dotted keys of a recipe, with None where a flag was not given.

    Raises:
        UsageError: they contradict each other, or name no data.
        RecipeError: the recipe does not hold.
        CheckpointError: the run holds no float model.
    """
    from ricciq.recipe import Recipe

    messages: list[str] = []
    source = _model_and_weights(model, checkpoint, messages)
    loaded = Recipe.load(name) if name else Recipe()
    asked = options.widths(*widths, messages)
    bits = {"quantization": loaded.quantization.model_dump() | asked} if asked else {}
    method = flags.pop("method.name", None)
    if method not in (None, loaded.method.name):  # a method's values are not another's
        flags["method"] = {"name": method}
    merged = loaded.override({**source, **bits, **flags})
    if not merged.data.name:
        raise UsageError(f"no data was named; give --data {forms()}")
    return merged, messages


def _model_and_weights(model: str, checkpoint: Path | None, messages: list[str]) -> dict[str, Any]:
    """What MODEL and --checkpoint put into the recipe."""
    path = Path(model)
    named = {"model.name": model, "model.checkpoint": checkpoint}
    if not os.path.exists(path):  # Path.exists raises where a name is too long
        return named
    if _is_model_name(model):
        messages.append(
            f"{model} is taken as the name of the model, not of what lies here; give ./{model} to "
            "start from that"
        )
        return named
    if checkpoint is not None:
        raise UsageError(f"{model} has weights of its own; give either it or --checkpoint")
    from ricciq.workflows.saved import float_source

    return float_source(path)


def _is_model_name(model: str) -> bool:
    """Whether timm, or this package, has a model of this name, with or without a tag."""
    if os.path.basename(model) != model:
        return False
    from timm import is_model

    import ricciq.models.bundled  # noqa: F401  registers its models

    return is_model(model.partition(".")[0])
