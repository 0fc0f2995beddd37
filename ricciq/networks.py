"""What is taken as a classifier: a torch module behind any wrappers, and logits in its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from ricciq.errors import ModelError


def network_of(model: nn.Module) -> nn.Module:
    """The network behind wrappers such as `torch.compile` and `nn.DataParallel` return.

    Args:
        model: what a user has.

    Returns:
        A module of Python code and float32 weights.

    Raises:
        ModelError: it is no such module.
    """
    model = _unwrapped(model)
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the model is a {kind}, not a torch.nn.Module; build the network, load its weights "
            "and give that"
        )
    _check_layers(model)
    _check_weights(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                # Hooks compute it anew in each pass, as pruning does; it could not be copied.
                vars(module)[name] = value.detach()
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in getattr(model, "_modules", {}):  # compiled; its class loads slowly
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def _check_layers(model: nn.Module) -> None:
    """Refuse layers that cannot be replaced, or that compute with integers already."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{name or 'the model'} is TorchScript ({type(module).__name__}), whose layers "
                "cannot be replaced; give the module that it was made from"
            )
        if _is_quantized(module):
            raise ModelError(
                f"{name or 'the model'} is quantized or prepared for it by torch.ao "
                f"({type(module).__module__}); give the float model"
            )
    if isinstance(model, GraphModule) and "train" in vars(model):  # where it cannot change its mode
        raise ModelError(
            f"the model {type(model).__name__} is a program of torch.export, which has functions "
            "in place of layers; give the module that was exported"
        )


def _check_weights(model: nn.Module) -> None:
    """Refuse weights without values, and those of another precision."""
    kind = type(model).__name__
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"{name} of the model {kind} is on the meta device; load its weights")
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ModelError(
                f"{name} of the model {kind} is {str(parameter.dtype).removeprefix('torch.')}, "
                "but networks are computed in float32; give model.float()"
            )


def _is_quantized(module: nn.Module) -> bool:
    kind = type(module)
    parts = kind.__module__.split(".")
    return (
        parts[:2] == ["torch", "ao"]
        and not {"quantized", "qat"}.isdisjoint(parts)
        and kind.__name__ != "FloatFunctional"  # adds and multiplies in float
    )


def logits_of(output: object) -> Tensor:
    """The logits in what a model returns: the only tensor, or the one that is named ``logits``.

    Args:
        output: a tensor, or a dict, tuple or object with tensors.

    Raises:
        ModelError: they cannot be told from other tensors.
    """
    if isinstance(output, Tensor):
        return output
    by_name = output if isinstance(output, Mapping) else {"logits": getattr(output, "logits", None)}
    if isinstance(logits := by_name.get("logits"), Tensor):
        return logits
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if len(tensors) != 1:
        raise ModelError(
            f"the model returns a {type(output).__name__} of {len(tensors)} tensors without one "
            "named logits; wrap it in a module that returns the logits"
        )
    return tensors[0]


def check_logits(logits: Tensor, images: int, who: str = "the model") -> None:
    """Check that a model returns one row of logits for each image.

    Args:
        logits: what it returns.
        images: the number of images.
        who: the model, for the message.

    Raises:
        ModelError: it does not.
    """
    if logits.ndim != 2 or len(logits) != images:
        raise ModelError(
            f"{who} returns an output of shape {list(logits.shape)} for {images} images, so it is "
            "no classifier; choose another model"
        )
