"""Checkpoints in the forms that trainers and authors write them."""

import argparse
import collections
import datetime
import json
import pathlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ricciq.errors import CheckpointError
from ricciq.models.factory import LoadedModel, load_model

NAME = "test_resnet"


def fresh(name: str = NAME, **arguments: Any) -> nn.Module:
    """A timm model whose statistics differ from those of any other."""
    model: nn.Module = timm.create_model(name, **{"num_classes": 5, **arguments}).eval()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) * 0.01)
    return model


def check_same(loaded: LoadedModel, model: nn.Module, side: int | tuple[int, int] = 64) -> None:
    height, width = (side, side) if isinstance(side, int) else side
    images = torch.rand(2, loaded.preprocessing.input_size[0], height, width)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), model.eval()(images), rtol=1e-3, atol=1e-3)
    assert not loaded.has_new_head


def noted() -> argparse.Namespace:
    """Arguments of a trainer, of the kinds that its authors put there."""
    return argparse.Namespace(
        lr=np.float64(0.1),
        seed=np.int64(3),
        classes=np.arange(3),
        output=pathlib.Path("out"),
        data=pathlib.PureWindowsPath("C:/data"),
        counts=collections.defaultdict(list, {1: [2]}),
        began=datetime.datetime(2024, 1, 2),
        crop_pct=0.8,
    )


@pytest.mark.parametrize("suffix", [".pth.tar", ".ckpt", ".pt"])
@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema", "model_ema"])
def test_notes_of_trainers_are_read_over(tmp_path: Path, suffix: str, key: str) -> None:
    model, path = fresh(), tmp_path / f"checkpoint{suffix}"
    stored = {"epoch": 3, "metric": np.float32(71.5), "args": noted(), key: model.state_dict()}
    if key.endswith("_ema"):
        stored["state_dict"] = fresh().state_dict()
    torch.save(stored, path)
    loaded = load_model(NAME, checkpoint=path)
    check_same(loaded, model)
    assert loaded.preprocessing.crop_pct == 0.8


def test_a_checkpoint_of_timm_says_how_its_model_was_built(tmp_path: Path) -> None:
    model, path = fresh(global_pool="max", channels=(16, 32, 32, 32)), tmp_path / "best.pth.tar"
    args = argparse.Namespace(gp="max", bn_eps=None, model_kwargs={"channels": (16, 32, 32, 32)})
    torch.save({"state_dict": model.state_dict(), "args": args}, path)
    loaded = load_model(NAME, checkpoint=path)
    check_same(loaded, model)
    assert loaded.kwargs["global_pool"] == "max"


def test_other_classes_are_refused_wherever_they_are(tmp_path: Path) -> None:
    model, path = fresh(), tmp_path / "checkpoint.pth"
    for args in (argparse.Namespace(layer=nn.Linear(1, 1)), {"run": pathlib.Path.touch}):
        torch.save({"state_dict": model.state_dict(), "args": args}, path)
        with pytest.raises(CheckpointError, match="objects other than tensors"):
            load_model(NAME, checkpoint=path)
    torch.save({"state_dict": {"conv1.0.weight": np.zeros(3)}}, path)
    with pytest.raises(CheckpointError, match="has no weights, but"):
        load_model(NAME, checkpoint=path)


def lightning(model: nn.Module, attribute: str, **others: Tensor) -> dict[str, Any]:
    """A checkpoint in the layout of Lightning 2."""
    state = {f"{attribute}.{name}": value for name, value in model.state_dict().items()}
    return {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {**state, **others},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x.ckpt"}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "where": pathlib.Path("x")},
    }


@pytest.mark.parametrize("attribute", ["model", "net", "module", "_orig_mod", "my_network"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_checkpoint_of_lightning_is_unwrapped(
    tmp_path: Path, attribute: str, channels: int
) -> None:
    model, path = fresh(in_chans=channels, num_classes=1000), tmp_path / "last.ckpt"
    torch.save(lightning(model, attribute), path)
    loaded = load_model(NAME, checkpoint=path, channels=channels)
    check_same(loaded, model)
    assert loaded.messages == []


def test_the_classes_and_channels_are_those_of_the_wrapped_weights(tmp_path: Path) -> None:
    model, path = fresh(in_chans=1, num_classes=4), tmp_path / "last.ckpt"
    others = {"criterion.weight": torch.ones(4), "metric.total": torch.ones(1)}
    torch.save(lightning(model, "model._orig_mod", **others), path)
    loaded = load_model(NAME, checkpoint=path, channels=None)
    assert loaded.preprocessing.input_size[0] == 1
    check_same(loaded, model)
    (message,) = loaded.messages
    assert message.endswith("as the model has none: criterion.weight, metric.total")


def test_counters_of_averaging_and_of_profilers_are_left_out(tmp_path: Path) -> None:
    model, path = fresh(), tmp_path / "swa.pth"
    torch.save(AveragedModel(model).state_dict(), path)
    loaded = load_model(NAME, checkpoint=path)
    check_same(loaded, model)
    assert "n_averaged" in loaded.messages[0]
    state = model.state_dict()
    for part in ("", "conv1.", "layer1.0.conv1."):  # as thop registers them
        state |= {f"{part}total_ops": torch.zeros(1, dtype=torch.float64)}
        state |= {f"{part}total_params": torch.zeros(1, dtype=torch.float64)}
    torch.save(state, path)
    loaded = load_model(NAME, checkpoint=path)
    check_same(loaded, model)
    assert loaded.messages == [
        "left out of the checkpoint, as the model has none: total_ops, total_params, "
        "conv1.total_ops and 3 more"
    ]


# Names of original repositories


def facebook_convnext(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of facebookresearch/ConvNeXt, and its two-dimensional layer scales."""
    original = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "stem":
            parts[:1] = ["downsample_layers", "0"]
        elif "downsample" in parts:
            parts[:3] = ["downsample_layers", parts[1]]
        renamed = ".".join(parts).replace(".blocks.", ".").replace("conv_dw", "dwconv")
        renamed = renamed.replace("mlp.fc", "pwconv").replace("head.norm", "norm")
        original[renamed.replace("head.fc", "head")] = value
    return original


def original_swin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of microsoft/Swin-Transformer, with its buffers."""
    original = {}
    for name, value in state.items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        original[".".join(parts).replace("head.fc", "head")] = value
    index = torch.zeros(49, 49, dtype=torch.int64)
    return {**original, "layers.0.blocks.0.attn.relative_position_index": index}


@pytest.mark.parametrize(
    ("name", "original", "arguments"),
    [
        ("convnext_atto", facebook_convnext, {"depths": (1, 1, 1, 1), "conv_mlp": False}),
        ("swin_tiny_patch4_window7_224", original_swin, {"depths": (1, 1, 1, 1)}),
        ("deit_tiny_patch16_224", dict, {"depth": 1}),
    ],
)
def test_names_of_original_repositories_are_mapped(
    tmp_path: Path, name: str, original: Any, arguments: dict[str, Any]
) -> None:
    model, path = fresh(name, **arguments), tmp_path / "original.pth"
    torch.save({"model": original(model.state_dict()), "args": noted()}, path)
    loaded = load_model(name, checkpoint=path, kwargs=arguments)
    check_same(loaded, model, 224)


# Several files


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("by", ["folder", "index"])
def test_weights_in_several_files_are_read(tmp_path: Path, safe: bool, by: str) -> None:
    model = fresh()
    save_torch_state_dict(
        model.state_dict(), tmp_path, max_shard_size="200KB", safe_serialization=safe
    )
    (index,) = tmp_path.glob("*.index.json")
    assert len(list(tmp_path.glob("*-of-*"))) > 2
    check_same(load_model(NAME, checkpoint=tmp_path if by == "folder" else index), model)
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*-00002-of-"):
        load_model(NAME, checkpoint=index)


@pytest.mark.parametrize(
    "listed",
    ["{", "[]", {"weight_map": 3}, {"weight_map": {"a": "../x.bin"}}, {"weight_map": {"a": 1}}],
)
def test_a_list_of_files_elsewhere_is_refused(tmp_path: Path, listed: Any) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(listed if isinstance(listed, str) else json.dumps(listed))
    with pytest.raises(CheckpointError, match="does not list files of weights in its folder"):
        load_model(NAME, checkpoint=path)


# Branches


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("repvgg_a0", {}), ("mobileone_s0", {}), ("fastvit_t8", {}), ("repvit_m0_9", {})],
)
def test_branches_are_merged_before_and_after_saving(
    tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    model, path = fresh(name, **arguments), tmp_path / "model.pth"
    said = [f"the branches of the blocks of {name} are merged, as for inference"]
    states = (model.state_dict(), reparameterize_model(model).state_dict())
    for state in states:
        torch.save(state, path)
        loaded = load_model(name, checkpoint=path)
        check_same(loaded, model)
        assert loaded.is_fused
        assert loaded.messages == said
        assert loaded.model.state_dict().keys() == states[1].keys()
    kept = load_model(name, num_classes=5, pretrained=False)
    assert not kept.is_fused
    assert kept.model.state_dict().keys() == states[0].keys()
    again = load_model(name, num_classes=5, pretrained=False, fuse=True)
    assert again.model.state_dict().keys() == states[1].keys()


# Images of another size


@pytest.mark.parametrize("size", [96, (64, 128)])
@pytest.mark.parametrize("name", ["test_vit", "swinv2_cr_tiny_224"])
def test_weights_of_a_transformer_are_resampled(
    tmp_path: Path, name: str, size: int | tuple[int, int]
) -> None:
    small = {} if name == "test_vit" else {"depths": (1, 1, 1, 1)}
    model, path = fresh(name, **small), tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    loaded = load_model(name, checkpoint=path, input_size=size, kwargs=small)
    sides = (size, size) if isinstance(size, int) else size
    assert loaded.preprocessing.input_size == (3, *sides)
    # timm itself, which takes the weights as its pretrained ones
    expected = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 5},
        num_classes=5,
        img_size=sides,
        **small,
    )
    check_same(loaded, expected, sides)
    if name == "test_vit":
        assert loaded.messages == ["resampled to the size of the images: pos_embed"]


def test_a_saved_size_that_is_no_square_is_resampled(tmp_path: Path) -> None:
    model = fresh("test_vit", img_size=(64, 160))
    save_for_hf(model, tmp_path, safe_serialization=True)
    check_same(load_model("test_vit", checkpoint=tmp_path), model, (64, 160))
    wide = load_model("test_vit", checkpoint=tmp_path, input_size=(64, 320))
    assert wide.model.pos_embed.shape[1] == 1 + 4 * 20
    again = load_model("test_vit", checkpoint=tmp_path, kwargs={"img_size": [96, 96]})
    assert again.preprocessing.input_size == (3, 96, 96)


# What is no float model


def integers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (value * 100).to(torch.int32) if value.ndim > 1 else value
        for name, value in state.items()
    }


def int8(state: dict[str, Tensor]) -> dict[str, Tensor]:
    codes = {name: (v * 100).to(torch.int8) for name, v in state.items() if v.ndim > 1}
    scales = {f"{name}_scale": torch.ones(1) for name in codes}
    return {**state, **codes, **scales}


def lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As peft saves an adapter."""
    return {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight": torch.zeros(4, 4)
        for name in list(state)[:3]
        for part in "AB"
    }


def optimizer(_: dict[str, Tensor]) -> dict[str, Any]:
    model = fresh()
    made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    made.step()
    return made.state_dict()


@pytest.mark.filterwarnings("ignore")
def dynamically_quantized(_: dict[str, Tensor]) -> dict[str, Any]:
    model = torch.ao.quantization.quantize_dynamic(fresh("test_vit"), {nn.Linear})
    return model.state_dict()


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (integers, "has torch.int32 codes in 'conv1.0.weight' instead of weights"),
        (int8, "has quantized weights, such as 'conv1.0.weight', which cannot be trained"),
        (lora, "is an adapter"),
        (optimizer, "has no weights, but state, param_groups"),
        (dynamically_quantized, "has quantized weights, such as '"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
def test_what_is_no_float_model_is_refused(tmp_path: Path, made: Any, sentence: str) -> None:
    path = tmp_path / "file.pth"
    torch.save(made(fresh().state_dict()), path)
    with pytest.raises(CheckpointError) as caught:
        load_model(NAME, checkpoint=path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_is_rebuilt_as_for_its_weights() -> None:
    """timm's fbnetc_100 has another epsilon with weights than without."""
    found = {
        wanted: load_model("fbnetc_100", pretrained=False, as_pretrained=wanted).model
        for wanted in (True, False)
    }
    epsilons = {k: {m.eps for m in net.modules() if hasattr(m, "eps")} for k, net in found.items()}
    assert epsilons == {True: {1e-3}, False: {1e-5}}
