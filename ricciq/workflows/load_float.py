"""Load the float model of a recipe, with inputs and outputs that fit the data."""

from __future__ import annotations

from functools import partial

from ricciq.data.classes import imagenet_synsets, read_class_map
from ricciq.data.dataset import ImageData
from ricciq.models.factory import LoadedModel, load_model
from ricciq.recipe import Recipe

COLOUR = 3
"""Channels of a network that gets grey images as RGB."""


def load_float(recipe: Recipe, data: ImageData, *, weights: bool = True) -> LoadedModel:
    """Load the float model of a recipe, and number the classes of the data as its outputs.

    Where the outputs of the weights have names, and all classes of the data are among these, the
    weights keep their head. Otherwise the head has an output for each class of the data.

    Args:
        recipe: names the model, and perhaps a class map.
        data: the recipe's; labels become the numbers of the model's outputs.
        weights: load timm's pretrained weights.

    Returns:
        The model. Its messages also say where its outputs have their names from.

    Raises:
        RicciqError: the model or the class map cannot be used, or the map lacks a class.
    """
    load = partial(
        load_model,
        recipe.model.name,
        checkpoint=recipe.model.checkpoint,
        pretrained=recipe.model.pretrained and weights,
        input_size=recipe.data.input_size,
        preprocessing=recipe.data.preprocessing,
        kwargs=recipe.model.kwargs,
        fuse=recipe.model.is_fused,
        seed=recipe.seed,
    )
    loaded = load(num_classes=None, channels=None)
    own = _count(loaded), loaded.preprocessing.input_size[0]
    names, source = _outputs(recipe, data, loaded)
    needed = len(names) if data.labelled else own[0], own[1] if own[1] == COLOUR else data.channels
    if needed != own:
        loaded = load(num_classes=needed[0], channels=needed[1])
    written = loaded.class_names
    if names == data.class_names:
        if data.labelled and written and len(written) == len(names) and written != names:
            loaded.messages.append(
                f"the classes of data {data.name} are outputs of {recipe.model.name} in this "
                f"order, although its weights name them otherwise, such as {written[0]!r} for "
                f"{names[0]!r}; --class-map FILE gives another order"
            )
        return loaded
    said = (
        f"the {data.num_classes} classes of data {data.name} are outputs of {recipe.model.name}, "
        f"which {source} names; it has {len(names)}"
    )
    data.use_outputs(names, source)
    return loaded._replace(messages=[*loaded.messages, said])


def _outputs(recipe: Recipe, data: ImageData, loaded: LoadedModel) -> tuple[list[str], str]:
    """The names of the outputs that a model needs for the data, and where they are from."""
    count = _count(loaded)
    if data.labelled and recipe.data.class_map:
        given = read_class_map(recipe.data.class_map)
        names = given.outputs(len(given.names) if given.is_complete else count)
        return names, f"class map {given.path}"
    written = loaded.class_names or []
    for names, source in (
        (written if len(written) == count else [], str(recipe.model.checkpoint)),
        (imagenet_synsets(count) or [], "timm's list of ImageNet"),
    ):
        if data.labelled and set(data.class_names) <= set(names):
            return names, source
    return data.class_names, ""


def _count(loaded: LoadedModel) -> int:
    """The number of outputs that a model says it has; 0 if it does not say it."""
    return int(getattr(loaded.model, "num_classes", 0))
