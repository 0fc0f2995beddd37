"""From a command line to a recipe."""

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
    """Merge the defaults, a recipe, and the options of a command line, which take precedence.

    Args:
        model: a timm name, or a run's folder or file.
        checkpoint: float weights; None if ``model`` has its own.
        name: a shipped recipe or a file; None for the defaults.
        widths: --bits, --weight-bits, --act-bits and --max-bytes as typed.
        flags: values by dotted key of a recipe; None if an option was not given.

    Returns:
        The recipe, and messages for the user.

    Raises:
        UsageError: the options contradict each other, or no data were named.
        RecipeError: the recipe is invalid.
        CheckpointError: the run has no float model.
    """
    from ricciq.recipe import Recipe

    messages: list[str] = []
    source = _model_and_weights(model, checkpoint, messages)
    loaded = Recipe.load(name) if name else Recipe()
    asked = options.widths(*widths, messages)
    bits = {"quantization": loaded.quantization.model_dump() | asked} if asked else {}
    method = flags.pop("method.name", None)
    if method not in (None, loaded.method.name):  # settings of another method do not apply
        flags["method"] = {"name": method}
    merged = loaded.override({**source, **bits, **flags})
    if not merged.data.name:
        raise UsageError(f"no data were named; give --data {forms()}")
    return merged, messages


def _model_and_weights(model: str, checkpoint: Path | None, messages: list[str]) -> dict[str, Any]:
    """The recipe keys that MODEL and --checkpoint set."""
    path = Path(model)
    named = {"model.name": model, "model.checkpoint": checkpoint}
    if not os.path.exists(path):  # Path.exists raises where a name is too long
        return named
    if _is_model_name(model):
        messages.append(
            f"{model} is taken as the name of a model, not of the file or folder here; give "
            f"./{model} to start from that"
        )
        return named
    if checkpoint is not None:
        raise UsageError(f"{model} has its own weights; give either it or --checkpoint")
    from ricciq.workflows.saved import float_source

    return float_source(path)


def _is_model_name(model: str) -> bool:
    """Whether timm or this package has a model of this name, with or without a tag."""
    if os.path.basename(model) != model:
        return False
    from timm import is_model

    import ricciq.models.bundled  # noqa: F401  registers its models

    return is_model(model.partition(".")[0])
