"""Data with other classes than the weights know: the float model is trained first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from command import json_of, ricciq
from PIL import Image
from sklearn.datasets import load_digits

from ricciq.system.tables import read_csv
from ricciq.system.tensor_files import load_tensors

pytestmark = pytest.mark.slow

FIVE = ["0", "1", "2", "3", "4"]


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of the ten digits that the bundled weights know, 24 images of each to train on."""
    folder, found = tmp_path_factory.mktemp("five"), load_digits()
    for name in FIVE:
        for number, at in enumerate(np.flatnonzero(found.target == int(name))[:40]):
            path = folder / ("val" if number < 16 else "train") / name / f"{at}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((found.images[at] * 255 / 16).astype(np.uint8)).save(path)
    return folder


def words(five: Path, output: Path, *flags: str | Path) -> list[str | Path]:
    start = ["quantize", "digits_resnet8", "--data", five, "--batch-size", "16"]
    return [*start, "--epochs", "4", "--lr", "0.002", "--output", output, *flags]


@pytest.fixture(scope="module")
def run(five: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    answer = ricciq(*words(five, folder))
    assert answer.code == 0, answer.err
    assert "head for 10 classes was replaced by a random one for 5" in answer.err
    assert "training the float model first: 1 epochs of its head, 4 epochs of all" in answer.err
    return folder


def test_the_float_model_that_teaches_knows_the_classes(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["float"]["top1"] > 85  # a random head has about 20
    assert report["onnx"]["top1"] > report["float"]["top1"] - 10
    trained = report["float_training"]
    assert (trained["head_epochs"], trained["epochs"]) == (1, 4)
    assert trained["holdout_top1"] > 50
    assert "its new head for 1 epochs" in (run / "report.html").read_text()
    assert json_of("eval", run / "float.onnx")["top1"] == pytest.approx(report["float"]["top1"])


def test_the_head_alone_is_trained_first(run: Path) -> None:
    bundled, _ = load_tensors_of_bundled()
    head, _ = load_tensors(run / "float" / "head" / "best.safetensors")
    everything, _ = load_tensors(run / "float" / "all" / "best.safetensors")
    for name, tensor in bundled.items():
        if name.startswith("fc."):
            assert not torch.equal(head[name], everything[name])
        else:
            assert torch.equal(head[name], tensor), name
    assert not torch.equal(head["conv1.weight"], everything["conv1.weight"])
    assert len(read_csv(run / "float" / "all" / "summary.csv")) == 4


def load_tensors_of_bundled() -> tuple[dict[str, torch.Tensor], None]:
    from ricciq.models.factory import load_model

    return load_model("digits_resnet8", channels=1).model.state_dict(), None


@pytest.mark.parametrize("stage", ["head", "all"])
def test_a_run_that_is_stopped_in_it_goes_on_to_the_same_bits(
    five: Path, run: Path, tmp_path: Path, stage: str
) -> None:
    output = tmp_path / "run"
    kill = f"""
import os
from ricciq.training import loop
end = loop._Running.end_epoch
def killed(self, held):
    end(self, held)
    if self.folder.path.name == {stage!r}:
        os._exit(9)
loop._Running.end_epoch = killed
"""
    stopped = processes.start(words(five, output), code=kill)
    stopped.communicate()
    assert stopped.returncode == 9
    answer = ricciq(*words(five, output, "--resume"))
    assert answer.code == 0, answer.err
    for file in ("float/all/best.safetensors", "best.safetensors"):
        assert (output / file).read_bytes() == (run / file).read_bytes(), file


def test_a_new_head_is_not_quantized_without_training(five: Path, tmp_path: Path) -> None:
    answer = ricciq(*words(five, tmp_path / "a", "--epochs", "0", "--float-epochs", "0"))
    assert answer.code == 2
    assert "the head of digits_resnet8 is new" in answer.err
    assert "--float-epochs 0" in answer.err
    assert not (tmp_path / "a").exists()
    flags = ["--epochs", "0", "--float-epochs", "2", "--bits", "8"]
    report = json_of(*words(five, tmp_path / "b", *flags))
    assert report["training"]["epochs"] == 0
    assert report["float_training"]["epochs"] == 2
    plan = json_of(*words(five, tmp_path / "c", "--dry-run"))
    assert (plan["float_epochs"], plan["epochs"]) == (4, 4)
    plan = json_of(*words(five, tmp_path / "c", "--dry-run", "--epochs", "0"))
    assert (plan["float_epochs"], plan["epochs"]) == (92, 0)  # 20 (50,000 / 114) ** (1 / 4)


def test_a_float_model_that_is_not_trained_does_not_teach(five: Path, tmp_path: Path) -> None:
    answer = ricciq(*words(five, tmp_path / "run", "--float-epochs", "0", "--epochs", "1"))
    assert answer.code == 0, answer.err
    assert "the float model does not teach: its head is new" in answer.err
    assert not (tmp_path / "run" / "float").exists()


def test_a_study_trains_the_float_model_once_for_each_seed(five: Path, tmp_path: Path) -> None:
    answer = ricciq(
        *("compare", "digits_resnet8", "--data", five, "--methods", "ste,ricci", "--seeds", "2"),
        *("--epochs", "1", "--batch-size", "16", "--output", tmp_path / "study"),
    )
    assert answer.code == 0, answer.err
    floats = [tmp_path / "study" / "float" / f"seed{seed}" / "all" for seed in (0, 1)]
    assert all(len(read_csv(folder / "summary.csv")) == 1 for folder in floats)
