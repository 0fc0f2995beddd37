"""A timm name or a checkpoint -> a float model and its preprocessing; the small bundled nets.

The nets are registered with timm, so `timm.create_model("digits_resnet8", pretrained=True)` works
once this module is imported.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm import get_pretrained_cfg, is_model, list_models
from timm.data.config import resolve_data_config
from timm.models import (
    adapt_input_conv,
    build_model_with_cfg,
    create_model,
    generate_default_cfgs,
    load_state_dict,
    register_model,
)
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from ricciq.errors import CheckpointError, ModelError
from ricciq.preprocessing import Preprocessing

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
BUNDLED = Path(__file__).parent / "checkpoints"


class LoadedModel(NamedTuple):
    """A float model and what goes with it.

    Attributes:
        model: in evaluation mode; logits (B, num_classes) from pictures (B, C, H, W).
        preprocessing: what the model's input must look like.
        messages: what was changed to make weights fit, a sentence each.
    """

    model: nn.Module
    preprocessing: Preprocessing
    messages: list[str]


def load_model(
    name: str,
    *,
    num_classes: int,
    channels: int,
    checkpoint: Path | None,
    pretrained: bool,
    input_size: int | None = None,
    seed: int | None = None,
) -> LoadedModel:
    """Create a timm model and give it its weights.

    Args:
        name: timm's name, with or without a tag, such as "resnet50.a1_in1k".
        num_classes: size of the head.
        channels: 1 or 3 input channels.
        checkpoint: weights to load; goes before `pretrained`.
        pretrained: load the weights that timm knows under this name.
        input_size: height and width in pixels, instead of the model's own.
        seed: start of everything random; None draws from torch's global generator.

    Raises:
        ModelError: the name or tag is unknown, its pretrained weights cannot be had, or it cannot
            take pictures of `input_size`.
        CheckpointError: the checkpoint is missing, unreadable, unsafe or of another model.
    """
    config = _find_config(name)
    pretrained = pretrained and checkpoint is None
    if pretrained and not (config and config.has_weights):
        raise ModelError(
            f"timm has no pretrained weights for {name!r}: give a file with --checkpoint, or set "
            "`pretrained: false` in a recipe"
        )
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    if input_size and config and config.fixed_input_size:  # such models take it when built
        arguments["img_size"] = input_size
    with _seeded(seed):
        try:
            model: nn.Module = create_model(name, pretrained=pretrained, **arguments)
        except Exception as error:  # the hub client and each model raise errors of their own
            raise _not_created(name, pretrained, error) from error
    messages: list[str] = []
    if checkpoint is not None:
        weights = _read_checkpoint(checkpoint)
        messages = _adapt(model, weights)
        _load(model, weights, name, checkpoint)
    elif pretrained and config:
        if config.num_classes != num_classes:
            messages.append(_head_message(config.num_classes, num_classes))
        if config.input_size[0] != channels:
            messages.append(_stem_message(config.input_size[0], channels))
    preprocessing = _preprocessing(model.eval(), channels, input_size)
    if input_size:
        _try_size(model, name, preprocessing.input_size)
    return LoadedModel(model, preprocessing, messages)


def _find_config(name: str) -> Any:
    """timm's PretrainedCfg of a name; None for names that timm has given up but still maps."""
    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        near = difflib.get_close_matches(architecture, list_models(), n=3)
        raise ModelError(
            f"timm knows no model {architecture!r}: give "
            + (" or ".join(near) if near else "one that timm.list_models() names")
        )
    try:
        return get_pretrained_cfg(name)
    except RuntimeError as error:
        known = list_models(architecture, include_tags=True)
        tags = [full.partition(".")[2] for full in known if "." in full]
        near = difflib.get_close_matches(tag, tags, n=5, cutoff=0.0)
        raise ModelError(
            f"model {architecture!r} has no tag {tag!r}: give {' or '.join([*near, 'none'])}"
        ) from error


def _not_created(name: str, pretrained: bool, error: Exception) -> ModelError:
    if pretrained:
        return ModelError(
            f"the pretrained weights of {name!r} could not be loaded ({_reason(error)}): give a "
            "file with --checkpoint"
        )
    return ModelError(f"timm cannot build model {name!r} ({_reason(error)}): give another")


def _try_size(model: nn.Module, name: str, size: tuple[int, int, int]) -> None:
    """Most models find out in their forward pass that a size does not suit them."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, *size))
    except Exception as error:
        raise ModelError(
            f"model {name!r} cannot take pictures of {size[1]} pixels ({_reason(error)}): give "
            "another input size"
        ) from error


def _reason(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seed inside, and leave the global generator as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _preprocessing(model: nn.Module, channels: int, input_size: int | None) -> Preprocessing:
    config: dict[str, Any] = resolve_data_config(model=model)  # type: ignore[no-untyped-call]
    _, height, width = config["input_size"]
    size = (channels, input_size or height, input_size or width)
    normalization = {key: _per_channel(config[key], channels) for key in ("mean", "std")}
    return Preprocessing.from_dict(config | normalization | {"input_size": size})


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """As many values as channels; where the number changes, each is the mean of the given ones."""
    if len(values) == channels:
        return values
    return (sum(values) / len(values),) * channels


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, of its EMA copy if it has one; nothing in it is executed.

    Raises:
        CheckpointError: there is no such file, or it is damaged, unsafe, or not finite.
    """
    if path.is_dir():
        raise CheckpointError(f"checkpoint {path} is a folder: give a file inside it")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: give the path of a file")
    if path.suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise CheckpointError(
            f"checkpoint {path} has none of the endings {', '.join(CHECKPOINT_SUFFIXES)}: give a "
            "PyTorch or safetensors file"
        )
    try:
        # timm's training checkpoints hold a Namespace; older releases of timm did not allow it.
        with torch.serialization.safe_globals([argparse.Namespace]):
            weights = load_state_dict(str(path), use_ema=True, weights_only=True)
    except Exception as error:  # damaged files raise nearly anything
        raise CheckpointError(
            f"checkpoint {path} is damaged or holds objects beside tensors, so nothing of it was "
            f"loaded ({type(error).__name__}): save the weights again, best as .safetensors"
        ) from error
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"checkpoint {path} holds {type(value).__name__} {key!r} where a tensor belongs: "
                "give a file with a state dict"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(
                f"checkpoint {path} holds NaN or infinity in {key!r}: give one that trained well"
            )
    return weights


def _adapt(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Make head and first convolution fit in place, and say what was changed."""
    config: Any = model.pretrained_cfg
    own = model.state_dict()
    messages = []
    for name in _names(config["first_conv"]):
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
        messages.append(_stem_message(before, after))
    for name in _names(config["classifier"]):
        key = f"{name}.weight"
        if key not in weights or key not in own or weights[key].shape[1:] != own[key].shape[1:]:
            continue
        before, after = len(weights[key]), len(own[key])
        if before != after:
            weights.update({k: own[k] for k in (key, f"{name}.bias") if k in own})
            messages.append(_head_message(before, after))
    return messages


def _names(value: str | Iterable[str] | None) -> Iterable[str]:
    """timm writes one layer as a string, several as a tuple, none as None."""
    return (value,) if isinstance(value, str) else value or ()


def _head_message(before: int, after: int) -> str:
    return f"the head for {before} classes was replaced by a random one for {after}"


def _stem_message(before: int, after: int) -> str:
    return f"the first convolution was adapted from {before} to {after} channels"


def _load(model: nn.Module, weights: dict[str, Tensor], name: str, path: Path) -> None:
    own = model.state_dict()
    odd = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    fitting = {key: value for key, value in weights.items() if key not in odd}
    missing, unexpected = model.load_state_dict(fitting, strict=False)
    missing = [key for key in missing if key not in odd]
    if odd or missing or unexpected:
        misshapen = [f"{key} {list(weights[key].shape)} for {list(own[key].shape)}" for key in odd]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
        found = "; ".join(f"{kind}: {_first(keys)}" for kind, keys in kinds.items() if keys)
        raise CheckpointError(
            f"checkpoint {path} does not fit model {name!r} ({found}): give the model that it was "
            "saved from"
        )


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


class SmallResNet(ResNet):
    """timm's ResNet for pictures of 8 to 32 pixels: a 3x3 stem, no pooling, three stages.

    The stages have 16, 32 and 64 channels, and the second and third halve the size, as in the
    CIFAR-10 nets of He et al. 2015 (arXiv 1512.03385).
    """

    def __init__(self, blocks: int, stem_stride: int, in_chans: int = 3, **kwargs: Any) -> None:
        """Build with `blocks` blocks a stage; further arguments as for timm's ResNet."""
        # timm's plain stem always has 64 channels. Its deep one has twice stem_width, and so lets
        # the stages be built for 16; its convolutions are then replaced by one.
        super().__init__(
            BasicBlock,  # type: ignore[arg-type]  # timm annotates a class as an instance
            (blocks,) * 3,
            in_chans=in_chans,
            channels=(16, 32, 64),
            stem_type="deep",
            stem_width=8,
            **kwargs,
        )
        stem = nn.Conv2d(in_chans, 16, 3, stride=stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", stem)
        for unused in ("maxpool", "layer4"):
            self.add_module(unused, nn.Identity())
        reductions = [stem_stride * factor for factor in (1, 1, 2, 4)]
        for info, reduction in zip(self.feature_info, reductions, strict=True):
            info["reduction"] = reduction


def _config(size: tuple[int, int, int], classes: int, **values: Any) -> dict[str, Any]:
    return {
        "input_size": size,
        "num_classes": classes,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "first_conv": "conv1",
        "classifier": "fc",
        **values,
    }


default_cfgs = generate_default_cfgs(
    {
        # Mean and deviation of the 1,437 training pictures of `digits`, as bytes over 255.
        "digits_resnet8.ricciq": _config(
            (1, 8, 8),
            10,
            mean=(0.3054,),
            std=(0.3760,),
            file=str(BUNDLED / "digits_resnet8.safetensors"),
        ),
        # Of the 60,000 training pictures of Fashion-MNIST.
        "fashion_resnet8.ricciq": _config(
            (1, 28, 28),
            10,
            mean=(0.2860,),
            std=(0.3530,),
            file=str(BUNDLED / "fashion_resnet8.safetensors"),
        ),
        # Of the 50,000 training pictures of CIFAR-10, the values in common use.
        "cifar_resnet20": _config(
            (3, 32, 32), 10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
        ),
    }
)


def _build(variant: str, blocks: int, stem_stride: int, pretrained: bool, **kwargs: Any) -> ResNet:
    built: ResNet = build_model_with_cfg(
        SmallResNet, variant, pretrained, blocks=blocks, stem_stride=stem_stride, **kwargs
    )
    return built


@register_model
def digits_resnet8(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Three blocks for the 8x8 pictures of `digits`: 78,000 parameters."""
    return _build("digits_resnet8", 1, 1, pretrained, **kwargs)


@register_model
def fashion_resnet8(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Three blocks for the 28x28 pictures of Fashion-MNIST, halved by the stem."""
    return _build("fashion_resnet8", 1, 2, pretrained, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Nine blocks for the 32x32 pictures of CIFAR-10."""
    return _build("cifar_resnet20", 3, 1, pretrained, **kwargs)
