"""timm names, checkpoints and the bundled networks."""

import argparse
import json
import math
import os
import pickle
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _registry
from torch import Tensor, nn

from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import CheckpointError, ModelError
from ricciq.models import build as models
from ricciq.models.factory import load_model

NETS = ["digits_resnet8", "fashion_resnet8", "cifar_resnet20"]


def load(name: str, **options):
    defaults = {"num_classes": 10, "channels": 3, "checkpoint": None, "pretrained": False}
    return load_model(name, **(defaults | options))


def weights_of(name: str, seed: int = 7, **arguments) -> dict[str, Tensor]:
    """A full state dict with every tensor, statistics included, unlike a fresh one's."""
    generator = torch.Generator().manual_seed(seed)
    state = timm.create_model(name, **arguments).state_dict()
    return {
        key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in state.items()
    }


def one_sentence(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert "Traceback" not in message
    for word in words:
        assert word in message


def same(model: nn.Module, weights: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for key, value in weights.items():
        if key not in but:
            assert torch.equal(state[key], value), key


# Names


@pytest.mark.parametrize(
    ("name", "near"), [("resnet5O", "resnet50"), ("digits_resnet", "digits_resnet8")]
)
def test_an_unknown_model_names_the_nearest(name, near):
    with pytest.raises(ModelError) as error:
        load(name)
    one_sentence(error, repr(name), near)


@pytest.mark.parametrize("name", ["", "qqqqqqqqqqqq", "hf-hub:qq/qq", "../x"])
def test_a_name_unlike_any_model_is_refused(name):
    with pytest.raises(ModelError) as error:
        load(name)
    one_sentence(error, "knows no model")


def test_a_tag_is_understood_and_an_unknown_one_names_others():
    assert load("test_resnet.r160_in1k").model.num_classes == 10
    with pytest.raises(ModelError) as error:
        load("resnet50.a1")
    one_sentence(error, "'resnet50'", "'a1'", "a1_in1k")
    with pytest.raises(ModelError) as error:
        load("cifar_resnet20.nope")
    one_sentence(error, "'nope'", "give none")


def test_a_model_is_ready_for_evaluation_and_of_the_asked_shape():
    loaded = load("test_resnet", num_classes=7, channels=1)
    assert not loaded.model.training
    assert loaded.messages == []
    assert loaded.model(torch.zeros(2, 1, 160, 160)).shape == (2, 7)


def test_a_seed_repeats_the_random_weights_and_keeps_the_generator():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, third = (load("digits_resnet8", channels=1, seed=s).model for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    same(first, second.state_dict())
    assert not torch.equal(first.conv1.weight, third.conv1.weight)
    unseeded = [load("digits_resnet8", channels=1).model.conv1.weight for _ in range(2)]
    assert not torch.equal(*unseeded)


def test_pretrained_weights_that_do_not_exist_are_refused():
    with pytest.raises(ModelError) as error:
        load("cifar_resnet20", pretrained=True)
    one_sentence(error, "cifar_resnet20", "--checkpoint", "pretrained: false")


def test_a_failed_download_names_the_model_and_the_remedy(monkeypatch):
    def offline(*_args, **_options):
        raise ConnectionError("no route to the hub.\nand more")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(ModelError) as error:
        load("test_resnet.r160_in1k", pretrained=True)
    one_sentence(error, "test_resnet.r160_in1k", "no route to the hub", "--checkpoint")


def test_downloaded_weights_are_adapted_with_messages(monkeypatch):
    state = weights_of("test_resnet")
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state)
    )
    loaded = load("test_resnet", pretrained=True, num_classes=1000)
    same(loaded.model, state)
    assert loaded.messages == []
    loaded = load("test_resnet", pretrained=True, num_classes=4, channels=1)
    assert torch.equal(loaded.model.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])
    assert len(loaded.messages) == 2
    assert "1000 classes" in loaded.messages[0]
    assert "3 to 1 channels" in loaded.messages[1]


# Preprocessing


def test_preprocessing_comes_from_timm():
    assert load("test_resnet").preprocessing == Preprocessing(
        (3, 160, 160), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.95, "center"
    )


def test_preprocessing_of_one_channel_averages_the_colours():
    preprocessing = load("resnet18.a1_in1k", channels=1).preprocessing
    assert preprocessing.input_size == (1, 224, 224)
    assert preprocessing.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert preprocessing.std == pytest.approx(((0.229 + 0.224 + 0.225) / 3,))
    colour = load("fashion_resnet8", channels=3).preprocessing
    assert (colour.mean, colour.std) == ((0.2860,) * 3, (0.3530,) * 3)


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224"])
def test_an_input_size_is_honoured(name):
    model, preprocessing = load(name, input_size=96)[:2]
    assert preprocessing.input_size == (3, 96, 96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 10)


def test_an_impossible_input_size_is_refused():
    with pytest.raises(ModelError) as error:
        load("test_vit", input_size=97)
    one_sentence(error, "test_vit", "97 pixels", "input size")


def test_a_model_that_timm_cannot_build_is_refused():
    with pytest.raises(ModelError) as error:
        load("digits_resnet8", num_classes=10**12)
    one_sentence(error, "digits_resnet8", "cannot build")


# Checkpoints


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".pth.tar", ".PTH"])
def test_every_ending_is_read(tmp_path, suffix):
    weights = weights_of("digits_resnet8")
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    loaded = load("digits_resnet8", channels=1, checkpoint=path, pretrained=True)
    same(loaded.model, weights)
    assert loaded.messages == []
    assert not loaded.model.training


def test_metadata_of_a_safetensors_file_does_not_matter(tmp_path):
    weights = weights_of("digits_resnet8")
    path = tmp_path / "weights.safetensors"
    save_file(weights, path, metadata={"ricciq": json.dumps({"schema": 1})})
    same(load("digits_resnet8", channels=1, checkpoint=path).model, weights)


def test_a_timm_training_checkpoint_gives_its_ema_weights(tmp_path):
    plain, averaged = (weights_of("digits_resnet8", seed) for seed in (1, 2))
    path = tmp_path / "checkpoint-3.pth.tar"
    training = {
        "epoch": 3,
        "arch": "digits_resnet8",
        "state_dict": plain,
        "state_dict_ema": averaged,
        "args": argparse.Namespace(lr=0.1, model="digits_resnet8"),
        "version": 2,
    }
    torch.save(training, path)
    same(load("digits_resnet8", channels=1, checkpoint=path).model, averaged)
    del training["state_dict_ema"]
    torch.save(training, path)
    same(load("digits_resnet8", channels=1, checkpoint=path).model, plain)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_wrappers_prefixes_are_stripped(tmp_path, prefix):
    weights = weights_of("digits_resnet8")
    path = tmp_path / "weights.pth"
    torch.save({prefix + key: value for key, value in weights.items()}, path)
    same(load("digits_resnet8", channels=1, checkpoint=path).model, weights)


def test_a_head_of_another_size_is_replaced_with_a_message(tmp_path):
    weights = weights_of("digits_resnet8", num_classes=5)
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    first, second = (
        load("digits_resnet8", channels=1, checkpoint=path, seed=seed) for seed in (1, 2)
    )
    same(first.model, weights, but=("fc.weight", "fc.bias"))
    assert first.model.fc.weight.shape == (10, 256)
    assert not torch.equal(first.model.fc.weight, second.model.fc.weight)
    (message,) = first.messages
    assert "5 classes" in message
    assert "random one for 10" in message


def test_the_first_convolution_is_adapted_with_a_message(tmp_path):
    path = tmp_path / "weights.pth"
    colour = weights_of("cifar_resnet20")
    torch.save(colour, path)
    grey = load("cifar_resnet20", channels=1, checkpoint=path)
    torch.testing.assert_close(
        grey.model.conv1.weight.data, colour["conv1.weight"].sum(1, keepdim=True)
    )
    same(grey.model, colour, but=("conv1.weight",))
    assert "3 to 1 channels" in grey.messages[0]

    fashion = weights_of("fashion_resnet8")
    torch.save(fashion, path)
    adapted = load("fashion_resnet8", channels=3, checkpoint=path)
    assert "1 to 3 channels" in adapted.messages[0]
    # A grey image in three channels must look to the model as it did in one.
    original = load("fashion_resnet8", channels=1, checkpoint=path)
    image = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(
        adapted.model.conv1(image.expand(-1, 3, -1, -1)), original.model.conv1(image)
    )


def broken(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "missing":
        del weights["layer2.0.conv1.weight"]
    elif how == "unexpected":
        weights["layer9.weight"] = torch.zeros(1)
    elif how == "of another shape":
        weights["layer2.0.conv1.weight"] = torch.zeros(32, 16, 5, 5)
    elif how == "headless":
        del weights["fc.weight"], weights["fc.bias"]
    elif how == "wide head":
        weights["fc.weight"] = torch.zeros(10, 99)
    return weights


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", ["missing: layer2.0.conv1.weight"]),
        ("unexpected", ["unexpected: layer9.weight"]),
        ("of another shape", ["layer2.0.conv1.weight [32, 16, 5, 5] for [128, 64, 3, 3]"]),
        ("headless", ["missing: fc.weight, fc.bias"]),
        ("wide head", ["fc.weight [10, 99] for [10, 256]"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_keys(tmp_path, how, words):
    path = tmp_path / "weights.safetensors"
    save_file(broken(weights_of("digits_resnet8"), how), path)
    with pytest.raises(CheckpointError) as error:
        load("digits_resnet8", channels=1, checkpoint=path)
    one_sentence(error, str(path), "digits_resnet8", *words)


def test_a_checkpoint_of_another_model_names_a_few_keys_only(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(weights_of("test_vit"), path)
    with pytest.raises(CheckpointError) as error:
        load("digits_resnet8", channels=1, checkpoint=path)
    one_sentence(error, "missing: conv1.weight, bn1.weight, bn1.bias and", "unexpected: ", "more)")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(("value", "fits"), [(math.inf, True), (-math.nan, False), (7.0, True)])
def test_a_bound_that_is_infinite_at_first_may_be_infinite(tmp_path, monkeypatch, value, fits):
    # As the clipped layers of Gemma 4's encoder, whose bounds not every checkpoint sets.
    def bounded(*arguments, **options):
        model = timm.create_model(*arguments, **options)
        model.fc.register_buffer("highest", torch.tensor(math.inf))
        return model

    monkeypatch.setattr(models, "create_model", bounded)
    weights = bounded("digits_resnet8", in_chans=1).state_dict()
    weights["fc.highest"] = torch.tensor(value)
    path = tmp_path / "bounded.safetensors"
    save_file(weights, path)
    with nullcontext() if fits else pytest.raises(CheckpointError, match="NaN or infinity"):
        loaded = load("digits_resnet8", channels=1, checkpoint=path)
        assert loaded.model.fc.highest == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    weights = weights_of("digits_resnet8")
    weights["layer1.0.bn2.running_var"][3] = value
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    with pytest.raises(CheckpointError) as error:
        load("digits_resnet8", channels=1, checkpoint=path)
    one_sentence(error, str(path), "layer1.0.bn2.running_var")


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_malicious_checkpoint_is_refused_and_not_executed(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "weights.pth"
    for content in (Payload(marker), {"state_dict": {"conv1.weight": Payload(marker)}}):
        for write in (
            lambda content: torch.save(content, path),
            lambda content: torch.save(content, path, _use_new_zipfile_serialization=False),
            lambda content: path.write_bytes(pickle.dumps(content, protocol=2)),
        ):
            write(content)
            with pytest.raises(CheckpointError) as error:
                load("digits_resnet8", channels=1, checkpoint=path)
            one_sentence(error, str(path), "nothing was loaded", ".safetensors")
            assert not marker.exists()
    # The payload is a real one.
    pickle.loads(path.read_bytes())
    assert marker.exists()


def test_a_pickled_model_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError) as error:
        load("digits_resnet8", checkpoint=path)
    one_sentence(error, str(path), "objects other than tensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, suffix, share):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights_of("digits_resnet8"), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError) as error:
        load("digits_resnet8", channels=1, checkpoint=path)
    one_sentence(error, str(path), "damaged")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": [1]}, torch.zeros(2), 5])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError) as error:
        load("digits_resnet8", channels=1, checkpoint=path)
    one_sentence(error, str(path))


def test_paths_that_are_no_checkpoint_are_refused(tmp_path):
    other = tmp_path / "model.onnx"
    other.write_bytes(b"onnx")
    for path, words in (
        (tmp_path / "none.pth", "there is no checkpoint"),
        (tmp_path, "has no model.safetensors"),
        (other, "extensions .safetensors"),
    ):
        with pytest.raises(CheckpointError) as error:
            load("digits_resnet8", checkpoint=path)
        one_sentence(error, str(path), words)


# The bundled nets


@pytest.mark.parametrize("name", NETS)
def test_the_nets_follow_timm_conventions(name):
    model = timm.create_model(name)
    config = model.pretrained_cfg
    channels, height, width = config["input_size"]
    image = torch.rand(2, channels, height, width)
    stride = 2 if name == "fashion_resnet8" else 1
    widths = (64, 128, 256) if name == "digits_resnet8" else (16, 32, 64)
    features = model.forward_features(image)
    assert features.shape == (2, model.num_features, -(-height // (4 * stride)), features.shape[3])
    assert model(image).shape == (2, 10)
    assert model.get_classifier() is model.fc
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    assert model.get_submodule(config["first_conv"]).in_channels == channels
    for info in model.feature_info:
        assert info["num_chs"] in widths
    backbone = timm.create_model(name, features_only=True, out_indices=(0, 1, 2, 3))
    for feature, info in zip(backbone(image), model.feature_info, strict=True):
        assert feature.shape[1] == info["num_chs"]
        assert feature.shape[2] == -(-height // info["reduction"])


def test_the_mobile_net_is_five_inverted_residuals():
    model = timm.create_model("fashion_mobilenet")
    config = model.pretrained_cfg
    assert model(torch.rand(2, *config["input_size"])).shape == (2, 10)
    assert model.get_submodule(config["first_conv"]).in_channels == 1
    assert model.get_classifier() is model.get_submodule(config["classifier"])
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [m.groups for m in depthwise] == [16, 64, 96, 96, 160]
    assert (
        timm.create_model("fashion_mobilenet", in_chans=3)(torch.rand(2, 3, 28, 28))
        .isfinite()
        .all()
    )


def test_the_nets_honour_timm_arguments():
    model = timm.create_model("cifar_resnet20", in_chans=1, num_classes=4, zero_init_last=False)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 4)
    assert model.layer1[0].bn2.weight.abs().sum() > 0
    expected = (2 / (16 * 3 * 3)) ** 0.5  # as timm starts every convolution: He, fan out
    assert model.conv1.weight.std().item() == pytest.approx(expected, rel=0.25)
    model = timm.create_model("cifar_resnet20")
    assert model.layer1[0].bn2.weight.abs().sum() == 0
    assert [len(getattr(model, f"layer{n}")) for n in (1, 2, 3)] == [3, 3, 3]
    assert sum(p.numel() for p in model.parameters()) == 272474


@pytest.mark.parametrize("name", ["digits_resnet8", "fashion_resnet8"])
@pytest.mark.parametrize("tag", ["", ".ricciq"])
def test_bundled_weights_are_found(tmp_path, monkeypatch, name, tag):
    config = timm.get_pretrained_cfg(name + tag)
    package = Path(sys.modules["ricciq.models.factory"].__file__).parent
    assert Path(config.file) == package / "checkpoints" / f"{name}.safetensors"
    weights = weights_of(name)
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    monkeypatch.setattr(_registry._model_pretrained_cfgs[name + tag], "file", str(path))
    same(load(name + tag, channels=1, pretrained=True).model, weights)
    path.unlink()
    with pytest.raises(ModelError) as error:
        load(name + tag, channels=1, pretrained=True)
    one_sentence(error, name, "--checkpoint")


def test_normalization_of_the_digits_net_is_that_of_its_training_images():
    from ricciq.data.open import open_data

    plain = Preprocessing((1, 8, 8), (0.0,), (1.0,))
    data = open_data("digits", None)
    options = {"batch_size": 2000, "workers": 0, "training": False}
    parts = [next(iter(data.loader(s, plain, **options)))[0] for s in ("fit", "holdout")]
    pixels = torch.cat(parts).double()
    preprocessing = load("digits_resnet8", channels=1).preprocessing
    assert preprocessing.mean[0] == pytest.approx(pixels.mean().item(), abs=5e-5)
    assert preprocessing.std[0] == pytest.approx(pixels.std(correction=0).item(), abs=5e-5)
    assert preprocessing.crop_pct == 1.0
