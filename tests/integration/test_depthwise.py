"""A net of depthwise convolutions, which few bits hurt most, trains at W4 A4 without collapse."""

from __future__ import annotations

from pathlib import Path

import pytest
from fashion import lay_out_fashion_mnist, needs_fashion
from safetensors.torch import save_file

from ricciq import Recipe, finetune, load_model, open_data, run

pytestmark = pytest.mark.slow


def leave_few_to_validate_on(raw: Path, count: int) -> None:
    """Ten thousand pictures take onnxruntime longer than the training does."""
    for name, header, size in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
        path = raw / f"t10k-{name}-ubyte"
        content = path.read_bytes()
        number = count.to_bytes(4, "big")
        path.write_bytes(content[:4] + number + content[8 : header + count * size])


@needs_fashion
def test_a_depthwise_net_keeps_its_accuracy_at_four_bits(tmp_path: Path) -> None:
    root = lay_out_fashion_mnist(tmp_path / "fashion")
    leave_few_to_validate_on(root / "FashionMNIST" / "raw", 1000)
    recipe = Recipe.from_values(
        {
            "model": {"name": "fashion_mobilenet", "checkpoint": tmp_path / "float.safetensors"},
            "data": {
                "name": "torch/fashion_mnist",
                "dir": str(root),
                "batch_size": 32,
                "train_samples": 2500,
            },
            "quantization": {"weight_bits": 4, "act_bits": 4},
            "training": {"epochs": 1, "lr": 4e-3},
        }
    )
    data = open_data("torch/fashion_mnist", root)
    float_model, preprocessing, *_ = load_model(
        "fashion_mobilenet", num_classes=10, channels=1, pretrained=False, seed=0
    )
    fit = data.loader("fit", preprocessing, batch_size=32, training=True, train_samples=2500)
    holdout = data.loader("holdout", preprocessing)
    finetune(float_model, fit, holdout, recipe.override({"training.epochs": 3}))
    save_file(float_model.state_dict(), tmp_path / "float.safetensors")

    report, _ = run(recipe, tmp_path / "run")
    assert report.float_.top1 > 75  # or there would be nothing to lose
    assert report.onnx.top1 > report.float_.top1 - 2
    assert report.onnx.agreement_unoptimized >= 99.5
