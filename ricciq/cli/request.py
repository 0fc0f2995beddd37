"""From a command line to a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ricciq.cli import options
from ricciq.cli.start import importing
from ricciq.data.sources.catalog import forms
from ricciq.errors import UsageError
from ricciq.models.names import architecture

if TYPE_CHECKING:
    from ricciq.data.dataset import ImageData
    from ricciq.recipe import Recipe


_IN_PLACES = set("/:@")
"""Names of timm have none of these; folders and repositories of the hub do."""


class Request(NamedTuple):
    """What a command line asks for.

    Attributes:
        recipe: defaults, recipe and options, merged.
        messages: for the user.
        data: the data, if they were opened to choose the recipe.
    """

    recipe: Recipe
    messages: list[str]
    data: ImageData | None


def requested_recipe(
    model: str,
    checkpoint: Path | None,
    name: str | None,
    widths: tuple[str | None, str | None, str | None, str | None],
    flags: dict[str, Any],
) -> Request:
    """Merge the defaults, a recipe, and the options of a command line, which take precedence.

    Args:
        model: a timm name, or a run's folder or file.
        checkpoint: float weights; None if ``model`` has its own.
        name: a shipped recipe or a file; "none" for the plain defaults; None chooses what fits.
        widths: --bits, --weight-bits, --act-bits and --max-bytes as typed.
        flags: values by dotted key of a recipe; None if an option was not given.

    Returns:
        The recipe, and messages for the user.

    Raises:
        UsageError: the options contradict each other, or no data were named.
        RecipeError: the recipe is invalid.
        CheckpointError: the run has no float model.
        DataError: the data, which were opened to choose a recipe, cannot be used.
        ModelError: timm knows no such model.
    """
    from ricciq.recipe import NONE, Recipe

    messages: list[str] = []
    source = _model_and_weights(model, checkpoint, messages)
    asked = options.widths(*widths, messages)

    def merged(base: Recipe) -> Recipe:
        bits = {"quantization": base.quantization.model_dump() | asked} if asked else {}
        given = {key: value for key, value in flags.items() if key != "method.name"}
        method = flags.get("method.name")
        if kwargs := flags.get("model.kwargs"):
            given["model.kwargs"] = base.model.kwargs | kwargs
        if method not in (None, base.method.name):  # settings of another method do not apply
            given["method"] = {"name": method}
        return base.override({**source, **bits, **given})

    recipe = merged(Recipe() if name in (None, NONE) else Recipe.load(name))
    if not recipe.data.name:
        raise UsageError(f"no data were named; give --data {forms()}")
    if name is not None:
        return Request(recipe, messages, None)
    with importing():
        from ricciq.workflows.choose_recipe import choose_recipe

    choice = choose_recipe(recipe, {key for key, value in flags.items() if value is not None})
    messages.append(choice.reason)
    return Request(merged(choice.recipe), messages, choice.data)


def _model_and_weights(model: str, checkpoint: Path | None, messages: list[str]) -> dict[str, Any]:
    """The recipe keys that MODEL and --checkpoint set.

    Raises:
        UsageError: both name weights.
        CheckpointError: MODEL is a folder or a repository of the hub, and not there or damaged.
    """
    path = Path(model)
    named = {"model.name": model, "model.checkpoint": checkpoint}
    there = os.path.exists(path)  # Path.exists raises where a name is too long
    if there and _is_model_name(model):
        messages.append(
            f"{model} is taken as the name of a model, not of the file or folder here; give "
            f"./{model} to start from that"
        )
        return named
    if not there and not _IN_PLACES & set(model):
        return named
    _only_one(model, checkpoint)
    if there and not _is_of_timm(path):
        with importing():
            from ricciq.workflows.saved import float_source

        return float_source(path)
    with importing():
        from ricciq.models.pretrained import model_in

    name, weights = model_in(model)
    return {"model.name": name, "model.checkpoint": weights}


def _is_of_timm(path: Path) -> bool:
    """Whether a folder, or that of a file, is one as timm writes it, and not of a run."""
    folder = path if os.path.isdir(path) else path.parent
    return os.path.isfile(folder / "config.json")


def _only_one(model: str, checkpoint: Path | None) -> None:
    """Check that MODEL, which has its own weights, is not given together with --checkpoint.

    Raises:
        UsageError: it is.
    """
    if checkpoint is not None:
        raise UsageError(f"{model} has its own weights; give either it or --checkpoint")


def _is_model_name(model: str) -> bool:
    """Whether timm or this package has a model of this name, with or without a tag."""
    if os.path.basename(model) != model:
        return False
    with importing():
        from timm import is_model

        import ricciq.models.bundled  # noqa: F401  registers its models

    return is_model(architecture(model))
