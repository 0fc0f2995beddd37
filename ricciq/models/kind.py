"""What kind of network a timm model is, how large its images are, and how many classes it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from timm.models import create_model
from torch import nn

from ricciq.errors import ModelError
from ricciq.models.build import check_arguments, find_config
from ricciq.models.factory import load_model

Kind = Literal["batchnorm", "depthwise", "transformer"]


def network_kind(name: str, kwargs: Mapping[str, Any]) -> Kind:
    """The kind of a network, which decides how it is trained.

    Args:
        name: timm's name.
        kwargs: more arguments of timm's constructor.

    Returns:
        "batchnorm" for convolutions with BatchNorm, "depthwise" if some of them are depthwise, and
        "transformer" for all networks without BatchNorm.

    Raises:
        ModelError: timm knows no such model, or cannot build it.
    """
    find_config(name)
    check_arguments(kwargs)
    try:
        with torch.device("meta"):  # neither memory nor time for weights
            model: nn.Module = create_model(name, **kwargs)
    except Exception:  # some compute with their weights while they are built
        model = load_model(name, pretrained=False, kwargs=kwargs).model
    layers = list(model.modules())
    if not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers):
        return "transformer"
    convolutions = (layer for layer in layers if isinstance(layer, nn.Conv2d))
    depthwise = any(layer.groups == layer.in_channels > 1 for layer in convolutions)
    return "depthwise" if depthwise else "batchnorm"


def own_side(name: str) -> int:
    """The larger side of the images that a model was made for, in pixels.

    Args:
        name: timm's name.

    Raises:
        ModelError: timm knows no such model.
    """
    config = find_config(name)
    return max(config.input_size[1:]) if config else 224


def number_of_classes(name: str, model: nn.Module) -> int:
    """The number of classes of a timm model's own head.

    Args:
        name: of the model, for the message.
        model: of timm.

    Raises:
        ModelError: it has none.
    """
    classes = int(model.num_classes)  # type: ignore[arg-type]
    if classes < 1:
        raise ModelError(
            f"{name} is an encoder without classes, so its outputs are features; give data with "
            "labels to train a head, or a model that has one"
        )
    return classes
