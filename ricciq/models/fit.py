"""Fit weights from a file to a model: their names, head, input channels and branches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from timm.models import adapt_input_conv
from torch import Tensor, nn

from ricciq.errors import CheckpointError
from ricciq.models.build import Rename, fused

_WRAPPERS = ("module", "_orig_mod", "model", "net")
"""Attributes in which trainers keep the model, as Lightning's modules do."""
MOST_WRAPPERS = 8
"""Trainers within trainers that are looked through."""
_COUNTERS = ("n_averaged", "total_ops", "total_params")
"""Numbers that torch's averaged models and thop add to a state dict."""


class Fitted(NamedTuple):
    """Weights by the names of a model, which may be the fused one.

    Attributes:
        model: with random weights.
        weights: by its names, as far as they are of this model.
        messages: what was changed, a sentence for each change.
        is_fused: whether the branches of the blocks are merged already, in weights and model.
    """

    model: nn.Module
    weights: dict[str, Tensor]
    messages: list[str]
    is_fused: bool


def fit_names(model: nn.Module, weights: Mapping[str, Tensor], by: Rename | None) -> Fitted:
    """Name weights as a model does.

    Args:
        model: a timm model with random weights, in evaluation mode.
        weights: of a file.
        by: timm's function from the names of original checkpoints to its own.

    Returns:
        The model, and its weights. If their branches are merged already, so are the model's.
    """
    kept, left_out = unwrap(weights, model.state_dict())
    merged = fused(model)
    if merged is not None and merged.state_dict().keys() == kept.keys():
        return Fitted(merged, kept, [left_out] * bool(left_out), True)
    renamed, resampled = rename(kept, model, by)
    return Fitted(model, renamed, [said for said in (left_out, resampled) if said], False)


def unwrap(weights: Mapping[str, Tensor], own: Iterable[str]) -> tuple[dict[str, Tensor], str]:
    """Find the model's weights among all that a trainer saved.

    Args:
        weights: of the file.
        own: names of the model's tensors.

    Returns:
        The weights, without the name of the attribute that holds the model; and a message about
        what was left out, which may be empty.
    """
    own = set(own)
    roots = {name.partition(".")[0] for name in own}
    kept = {
        name: value
        for name, value in weights.items()
        if name in own or name.rpartition(".")[2] not in _COUNTERS
    }
    left_out = [name for name in weights if name not in kept]
    for _ in range(MOST_WRAPPERS):
        if own <= kept.keys():
            break
        inner: dict[str, dict[str, Tensor]] = {}
        for name, value in kept.items():
            root, dot, rest = name.partition(".")
            if dot and root not in roots:
                inner.setdefault(root, {})[rest] = value
        wrapped = [r for r, names in inner.items() if r in _WRAPPERS or own <= names.keys()]
        if not wrapped:
            break
        chosen = min(wrapped, key=lambda root: root not in _WRAPPERS)
        left_out += [name for name in kept if not name.startswith(f"{chosen}.")]
        kept = inner[chosen]
    message = f"left out of the checkpoint, as the model has none: {some_of(left_out)}"
    return kept, message if left_out else ""


def rename(
    weights: dict[str, Tensor], model: nn.Module, by: Rename | None
) -> tuple[dict[str, Tensor], str]:
    """Map names and shapes of original checkpoints to the model's, as timm does.

    Position embeddings are resampled to the size of the model's images.

    Args:
        weights: of the file.
        model: a timm model.
        by: timm's function for it.

    Returns:
        The weights, and a message about what was resampled, which may be empty. Those of another
        model may be as they were.
    """
    if by is None:
        return weights, ""
    mapped: Mapping[str, Tensor] = weights
    with suppress(Exception):  # of another model: then the names say so
        try:
            mapped = by(weights, model)
        except TypeError:  # some functions take no model
            mapped = by(weights)
    resampled = [
        name
        for name, value in mapped.items()
        if name in weights and value.numel() != weights[name].numel()
    ]
    message = f"resampled to the size of the images: {some_of(resampled)}"
    return dict(mapped), message if resampled else ""


def check_codes(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Refuse integers in the place of float weights, and weights that only adapt others.

    Args:
        weights: by the model's names.
        own: tensors of the model.
        path: of the file, for error messages.

    Raises:
        CheckpointError: there are some.
    """
    for name, value in weights.items():
        if name in own and own[name].is_floating_point() and not value.is_floating_point():
            raise CheckpointError(
                f"checkpoint {path} has {value.dtype} codes in {name!r} instead of weights; give "
                "the float model that they were made of"
            )
        if "lora_" in name and name not in own:
            raise CheckpointError(
                f"checkpoint {path} is an adapter (LoRA), without the weights that it adapts; "
                "merge it into its model and save that"
            )


def adapt_weights(
    model: nn.Module, weights: dict[str, Tensor], has_head: bool = True
) -> tuple[list[str], bool]:
    """Adapt weights in place to the head and the input channels of a model.

    Args:
        model: a timm model.
        weights: by the model's names.
        has_head: False if they are of an encoder, and the model has a head.

    Returns:
        What was changed, a sentence for each change, and whether the head is a random one.
    """
    config: Any = model.pretrained_cfg
    own = model.state_dict()
    messages, new_head = [], False
    for name in names_of_layers(config["first_conv"]):
        key = f"{name}.weight"
        if key not in weights or key not in own or weights[key].ndim != 4:
            continue
        before, after = weights[key].shape[1], own[key].shape[1]
        if (before, after) == (3, 1):
            weights[key] = adapt_input_conv(1, weights[key])
        elif (before, after) == (1, 3):
            weights[key] = weights[key].expand(-1, 3, -1, -1) / 3
        else:
            continue
        messages.append(stem_message(before, after))
    heads = classifiers(model)
    if not has_head:
        weights.update({key: own[key] for key in own if key.rpartition(".")[0] in heads})
        return [*messages, "the weights are of an encoder: the head is a random one"], True
    for name in heads:
        key = f"{name}.weight"
        if key not in weights or key not in own or weights[key].shape[1:] != own[key].shape[1:]:
            continue
        before, after = len(weights[key]), len(own[key])
        if before != after:
            weights.update({k: own[k] for k in (key, f"{name}.bias") if k in own})
            messages.append(head_message(before, after))
            new_head = True
    return messages, new_head


def classifiers(model: nn.Module) -> list[str]:
    """The names of a timm model's last layers; merged branches may have another than in its config.

    Args:
        model: with classes.
    """
    config: Any = model.pretrained_cfg
    named = [*names_of_layers(config["classifier"])]
    own = dict(model.named_modules())
    if any(name in own for name in named):
        return named
    head = model.get_classifier()  # type: ignore[operator]
    return [name for name, part in own.items() if part is head]


def names_of_layers(value: str | Iterable[str] | None) -> Iterable[str]:
    """The names of layers in a timm config: a string is one, a tuple several, None is none."""
    return (value,) if isinstance(value, str) else value or ()


def head_message(before: int, after: int) -> str:
    """The message about a head of another size.

    Args:
        before: number of classes in the weights.
        after: number of classes of the model.
    """
    return f"the head for {before} classes was replaced by a random one for {after}"


def stem_message(before: int, after: int) -> str:
    """The message about a first convolution for another number of channels.

    Args:
        before: input channels in the weights.
        after: input channels of the model.
    """
    return f"the first convolution was adapted from {before} to {after} channels"


def load_weights(model: nn.Module, weights: dict[str, Tensor], name: str, path: Path) -> None:
    """Load weights into a model.

    Args:
        model: the model to change.
        weights: by the model's names, after `adapt_weights`.
        name: of the model, for error messages.
        path: of the file, for error messages.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    own = model.state_dict()
    odd = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    fitting = {key: value for key, value in weights.items() if key not in odd}
    missing, unexpected = model.load_state_dict(fitting, strict=False)
    missing = [key for key in missing if key not in odd]
    if odd or missing or unexpected:
        misshapen = [f"{key} {list(weights[key].shape)} for {list(own[key].shape)}" for key in odd]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
        found = "; ".join(f"{kind}: {some_of(keys)}" for kind, keys in kinds.items() if keys)
        raise CheckpointError(
            f"checkpoint {path} does not fit model {name!r} ({found}); give the model that it was "
            "saved from"
        )


def some_of(names: list[str]) -> str:
    """The first three names, and how many more there are.

    Args:
        names: one or more.
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
