"""A run from a folder as timm writes it for the hub, of a network whose branches are merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from command import ricciq
from timm.models._hub import save_for_hf

NAME = "repvgg_a0"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that of timm, and the run from it."""
    place = tmp_path_factory.mktemp("given")
    model = timm.create_model(NAME, num_classes=10, in_chans=1)
    own: dict[str, Any] = {"label_names": [str(digit) for digit in range(10)]}
    own["pretrained_cfg"] = {"mean": [0.25], "std": [0.5], "crop_pct": 1.0}
    save_for_hf(model, place / "model", model_config=own, safe_serialization="both")
    quick = "quantization: {reconstruction: 0, scale_search: 1}\ntraining: {epochs: 0}\n"
    (place / "quick.yaml").write_text(quick)
    answer = ricciq(
        *("quantize", place / "model", "--data", "digits", "--recipe", place / "quick.yaml"),
        *("--bits", "8", "--input-size", "32,40", "--output", place / "run", "--json", "--offline"),
    )
    assert answer.code == 0, answer.err
    assert answer.err.count(f"the branches of the blocks of {NAME} are merged") == 1
    return place


@pytest.mark.slow
def test_the_recipe_makes_the_run_repeatable(place: Path) -> None:
    recipe = yaml.safe_load((place / "run" / "recipe.yaml").read_text())
    assert recipe["model"]["name"] == NAME
    assert recipe["model"]["checkpoint"] == str(place / "model")
    assert recipe["data"]["input_size"] == [32, 40]


@pytest.mark.slow
def test_merged_branches_are_single_layers_in_the_file(place: Path) -> None:
    report = json.loads((place / "run" / "report.json").read_text())
    names = [layer["name"] for layer in report["layers"]]
    assert len(names) == 23
    assert [name for name in names if "reparam_conv" not in name] == ["head.fc"]
    assert report["onnx"]["agreement"] == 100


@pytest.mark.slow
def test_the_run_is_opened_again(place: Path) -> None:
    onnx = place / "run" / "model.onnx"
    answer = ricciq(
        *("eval", place / "run", "--reference", onnx, "--min-agreement", "100", "--json")
    )
    assert answer.code == 0, answer.err
    found = ricciq("inspect", onnx, "--json")
    assert '"mean": [0.25]' in " ".join(found.out.split())


@pytest.mark.slow
def test_a_quantized_run_is_no_start(place: Path) -> None:
    for weights in (["--checkpoint", place / "run" / "best.safetensors"],):
        answer = ricciq("quantize", NAME, "--data", "digits", *weights, "--offline")
        assert answer.code == 3
        assert "has a model that is quantized already" in answer.err
