"""Weights as people keep them, and the preprocessing that is written beside them."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

from ricciq.errors import CheckpointError, ModelError
from ricciq.models.factory import load_model
from ricciq.models.kind import number_of_classes
from ricciq.models.pretrained import model_in
from ricciq.system.offline import SWITCH
from ricciq.system.tensor_files import save_tensors

OWN = {
    "input_size": [3, 32, 48],
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "crop_pct": 0.8,
    "interpolation": "bilinear",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as timm writes it for the hub: weights, and a config.json with its own values."""
    path = tmp_path_factory.mktemp("timm") / "model"
    model = timm.create_model("test_resnet", num_classes=3, global_pool="max")
    arguments = {"num_classes": 3, "in_chans": 3, "global_pool": "max"}
    config = {"num_classes": 3, "model_args": arguments, "pretrained_cfg": OWN}
    save_for_hf(model, path, model_config=config, safe_serialization=True)
    return path


def check_own(loaded: Any) -> None:
    values = loaded.preprocessing.to_dict()
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()} == {
        **OWN,
        "crop_mode": "center",
    }


def test_a_folder_of_timm_brings_its_preprocessing_and_its_arguments(folder: Path) -> None:
    loaded = load_model("test_resnet", checkpoint=folder)
    check_own(loaded)
    assert loaded.kwargs == {"global_pool": "max"}
    pooled: Any = loaded.model
    assert pooled.global_pool.pool_type == "max"
    assert loaded.messages == [
        f"the preprocessing is that of {folder / 'config.json'}: {loaded.preprocessing.brief}"
    ]
    assert not loaded.has_new_head
    assert loaded.class_names is None
    assert loaded.model(torch.zeros(1, 3, 32, 48)).shape == (1, 3)
    check_own(load_model("test_resnet", checkpoint=folder / "model.safetensors"))
    for name in (str(folder), f"local-dir:{folder}"):
        assert model_in(name) == ("test_resnet", folder)
        check_own(load_model("test_resnet", checkpoint=Path(name)))


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["cat", "dog", "owl"], ["cat", "dog", "owl"]),
        ({"0": "cat", "2": "owl"}, ["cat", "#1", "owl"]),  # timm's form with gaps
    ],
)
def test_class_names_are_those_of_the_config(tmp_path: Path, names: Any, read: list[str]) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    save_for_hf(model, tmp_path, model_config={"label_names": names}, safe_serialization=True)
    for checkpoint in (tmp_path, tmp_path / "model.safetensors"):
        assert load_model("test_resnet", checkpoint=checkpoint).class_names == read


@pytest.mark.parametrize("names", ["abc", [1, 2, 3], ["a"], {"3": "a"}, {"x": "a"}])
def test_class_names_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, names: Any) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "label_names": names}))
    with pytest.raises(CheckpointError, match="is not a config"):
        load_model("test_resnet", checkpoint=copy)


def test_what_is_asked_for_comes_first(folder: Path) -> None:
    asked = load_model(
        "test_resnet",
        checkpoint=folder,
        channels=1,
        input_size=64,
        preprocessing={"mean": (0.5,), "crop_pct": 1.0},
    ).preprocessing
    assert asked.input_size == (1, 64, 64)
    assert asked.mean == (0.5,)
    assert asked.std == (pytest.approx(0.5),)
    assert asked.crop_pct == 1.0
    assert asked.interpolation == "bilinear"


COMMIT = "0123456789" * 4


def in_cache(folder: Path, cache: Path, repository: str) -> Path:
    """Put a folder into a cache of the hub, as huggingface_hub lays it out; return its place."""
    snapshot = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    for revision in ("main", "v1.0"):
        (refs / revision).write_text(COMMIT)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:timm/test_resnet.r160_in1k",
        "hf_hub:timm/test_resnet.r160_in1k",
        "timm/test_resnet.r160_in1k",
        "timm/test_resnet.r160_in1k@v1.0",
        f"timm/test_resnet.r160_in1k@{COMMIT}",
        "test_resnet.r160_in1k@v1.0",
        "test_resnet@main",
    ],
)
def test_a_repository_of_the_hub_is_read_from_its_cache(
    folder: Path, cache: Path, name: str
) -> None:
    in_cache(folder, cache, "timm/test_resnet.r160_in1k")
    named, checkpoint = model_in(name)
    # The commit makes a run repeatable, whatever is pushed later.
    assert (named, str(checkpoint)) == (
        "test_resnet",
        f"hf-hub:timm/test_resnet.r160_in1k@{COMMIT}",
    )
    check_own(load_model(named, checkpoint=checkpoint))
    check_own(load_model(named, checkpoint=Path(name)))


def test_a_repository_that_cannot_be_downloaded_is_one_sentence(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_cache(folder, cache, "owner/name")
    with pytest.raises(CheckpointError, match="'hf-hub:owner/name@v2' cannot be loaded") as caught:
        model_in("hf-hub:owner/name@v2")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(CheckpointError, match="'hf-hub:owner/other' would be downloaded"):
        model_in("hf-hub:owner/other")


def test_a_training_checkpoint_of_timm_brings_its_arguments(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    arguments = argparse.Namespace(
        mean=[0.1, 0.2, 0.3], std=None, crop_pct=0.8, interpolation="", img_size=96, model="x"
    )
    for name, legacy in (("new.pth.tar", False), ("old.pth", True)):
        stored = {"arch": "test_resnet", "state_dict": state, "args": arguments}
        torch.save(stored, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        found = load_model("test_resnet", checkpoint=tmp_path / name).preprocessing
        assert found.input_size == (3, 96, 96)
        assert found.mean == (0.1, 0.2, 0.3)
        assert found.std == load_model("test_resnet", pretrained=False).preprocessing.std
        assert (found.crop_pct, found.interpolation) == (0.8, "bilinear")


def test_a_config_of_another_model_is_refused_with_its_folder_and_ignored_beside_a_file(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="has a test_resnet, not a test_vit; give test_resn"):
        load_model("test_vit", checkpoint=folder)
    weights = timm.create_model("test_vit", num_classes=3).state_dict()
    torch.save(weights, tmp_path / "vit.pth")
    shutil.copy(folder / "config.json", tmp_path)
    plain = load_model("test_vit", checkpoint=tmp_path / "vit.pth")
    assert plain.preprocessing == load_model("test_vit", pretrained=False).preprocessing


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("{", "is not a config.json as timm writes it"),
        ("[]", "is not a config.json as timm writes it"),
        ('{"model_type": "bert"}', "is not a config.json as timm writes it"),
        ({"input_size": 5}, "is not a config.json as timm writes it"),
        ({"input_size": [3, "a", 5]}, "has an invalid input_size, "),
        ({"input_size": [3, float("inf"), 5]}, "has an invalid input_size, "),
        ({"mean": ["a", "b", "c"]}, "has a value of the wrong type"),
        ({"mean": 3}, "config.json"),
        ({"std": [0, 1, 1]}, "has an invalid std"),
        ({"interpolation": "random"}, "has an invalid interpolation, 'random'"),
    ],
)
def test_a_damaged_config_is_one_sentence(
    folder: Path, tmp_path: Path, damage: str | dict[str, Any], sentence: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if isinstance(damage, dict):
        config = json.loads((copy / "config.json").read_text())
        config["pretrained_cfg"] |= damage
        damage = json.dumps(config)
    (copy / "config.json").write_text(damage)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_model("test_resnet", checkpoint=copy)
    assert "\n" not in str(caught.value)


def test_arguments_that_would_load_files_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["model_args"] = {"checkpoint_path": "/etc/passwd"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model\.kwargs checkpoint_path cannot be set"):
        load_model("test_resnet", checkpoint=copy)
    with pytest.raises(ModelError, match="timm cannot build model 'test_resnet'"):
        load_model("test_resnet", pretrained=False, kwargs={"colour": "red"})


def test_names_of_folders_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    for name in (f"local-dir:{tmp_path / 'nosuch'}", "owner/name", "no_such_model@main"):
        with pytest.raises(CheckpointError, match="there is no folder"):
            model_in(name)
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        model_in(f"local-dir:{tmp_path}")
    (tmp_path / "model.pth").touch()
    with pytest.raises(CheckpointError, match=r"has no config\.json that names its model"):
        model_in(f"local-dir:{tmp_path}")


def test_an_encoder_gets_a_head_if_classes_are_known(tmp_path: Path) -> None:
    encoder = timm.create_model("test_resnet", num_classes=0)
    save_for_hf(encoder, tmp_path, safe_serialization=True)
    loaded = load_model("test_resnet", checkpoint=tmp_path)
    assert not loaded.has_new_head
    with pytest.raises(ModelError, match="test_resnet is an encoder without classes"):
        number_of_classes("test_resnet", loaded.model)
    loaded = load_model("test_resnet", checkpoint=tmp_path, num_classes=4)
    assert loaded.has_new_head
    assert "the weights are of an encoder: the head is a random one" in loaded.messages
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.model.forward_features(x), encoder.eval().forward_features(x))
    assert loaded.model(x).shape == (1, 4)


def test_a_runs_weights_have_the_arguments_of_its_model(tmp_path: Path) -> None:
    """Without them, a float run with another pooling would be quantized as another network."""
    model = timm.create_model("test_resnet", global_pool="max")
    stored = {"recipe": {"model": {"kwargs": {"global_pool": "max"}}}}
    save_tensors(tmp_path / "best.safetensors", model.state_dict(), stored)
    loaded = load_model("test_resnet", checkpoint=tmp_path / "best.safetensors")
    assert loaded.kwargs == {"global_pool": "max"}
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.model(x), model.eval()(x))


def test_odd_arguments_of_a_training_checkpoint_say_nothing(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    arguments = argparse.Namespace(model_kwargs={(1, 2): 3}, mean=[0.5] * 3)
    torch.save({"state_dict": model.state_dict(), "args": arguments}, tmp_path / "odd.pth")
    assert load_model("test_resnet", checkpoint=tmp_path / "odd.pth").kwargs == {}
