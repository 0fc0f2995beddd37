"""Choose the recipe of a run that names none: a shipped one that fits, or a derived schedule."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from ricciq.data.dataset import ImageData
from ricciq.data.open import open_data
from ricciq.models.kind import network_kind, own_side
from ricciq.models.names import architecture
from ricciq.recipe import Recipe, shipped_recipes
from ricciq.recipe.schedule import Task, derived
from ricciq.recipe.sections import QuantizationSection

DEFAULTS_REMEDY = "--recipe none takes the plain defaults"


class Choice(NamedTuple):
    """A recipe for a run.

    Attributes:
        recipe: what the options of the command line override.
        reason: what was chosen and why, for the user.
        data: the opened data.
    """

    recipe: Recipe
    reason: str
    data: ImageData


def choose_recipe(asked: Recipe, given: Collection[str] = ()) -> Choice:
    """Choose a recipe for the model, the data and the widths that were asked for.

    A shipped recipe fits if it is for the same architecture and widths, and was written for data
    with about as many classes (up to a quarter more or fewer) and images (half to twice as many).
    Those that train from random weights are taken only by their name.

    Args:
        asked: the defaults, with the options of the command line.
        given: dotted keys that those options set, which are not derived.

    Returns:
        The recipe, without the options.

    Raises:
        DataError: the data cannot be used.
        ModelError: timm knows no such model.
    """
    data = open_data(asked.data.name, asked.data.dir, asked.data.holdout)
    fit = data.count("fit")
    if fitting := _fitting(asked, data):
        name, recipe = fitting
        written = recipe.written_for
        if recipe.data.holdout != asked.data.holdout:
            data.hold_out(recipe.data.holdout)
        return Choice(
            recipe,
            f"recipe {name} fits: it was written for {written.classes} classes and "
            f"{written.images} images; {DEFAULTS_REMEDY}",
            data,
        )
    size = asked.data.input_size or own_side(asked.model.name)
    task = Task(
        asked.data.train_samples or fit,
        network_kind(asked.model.name, asked.model.kwargs),
        size if isinstance(size, int) else max(size),
        _fewest_bits(asked.quantization),
    )
    values = {key: value for key, value in derived(task).items() if key not in given}
    said = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in values.items())
    return Choice(
        Recipe().override(values),
        f"schedule for {task.images} images and a network of kind {task.network}: {said}; "
        f"{DEFAULTS_REMEDY}",
        data,
    )


def _fewest_bits(widths: QuantizationSection) -> int:
    """The smaller width of weights and activations; a budget of bytes leaves only the latter."""
    if widths.weight_bits == "auto":
        return min(int(widths.average_bits or widths.act_bits), widths.act_bits)
    return min(2 if widths.weight_bits == "ternary" else widths.weight_bits, widths.act_bits)


def _fitting(asked: Recipe, data: ImageData) -> tuple[str, Recipe] | None:
    """The shipped recipe that fits, with its name; None if none does."""
    images = data.count("fit") + data.count("holdout")
    for name, file in shipped_recipes().items():
        recipe = Recipe.load(file)
        classes, number = recipe.written_for.classes, recipe.written_for.images
        if (
            classes is not None
            and number is not None
            and data.labelled
            and architecture(recipe.model.name) == architecture(asked.model.name)
            and recipe.quantization.weight_bits == asked.quantization.weight_bits
            and recipe.quantization.act_bits == asked.quantization.act_bits
            and 0.8 <= data.num_classes / classes <= 1.25
            and 0.5 <= images / number <= 2
        ):
            return name, recipe
    return None
