"""What follows and training itself, as multiples of what the float model takes: only prints.

    python tests/benchmarks/forecast.py resnet18 resnet50 mobilenetv2_100 vit_tiny_patch16_224

`ricciq.workflows.forecast` has a constant for each of these ratios. Weights are random.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from torch import nn

from ricciq import calibrate, export_onnx
from ricciq.convert.plan import plan_conversion
from ricciq.convert.rewrite import convert
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.modules import deploy
from ricciq.evaluation import Predict
from ricciq.recipe import Recipe
from ricciq.training.loop import correction_of
from ricciq.training.metrics import Tally
from ricciq.training.step import Trainer
from ricciq.workflows.saved import onnx_predictor

IMAGES = 16


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def evaluation(predict: Predict, images: torch.Tensor) -> float:
    """Of a batch, after one that is not timed."""
    with torch.inference_mode():
        predict(images[:2])
        return seconds(lambda: predict(images))


def step(
    model: nn.Module,
    images: torch.Tensor,
    trained: Sequence[nn.Parameter] | None = None,
    teacher: nn.Module | None = None,
) -> float:
    """Of an optimizer step of all parameters or some, after one that is not timed."""
    kept = copy.deepcopy(model).train().requires_grad_(trained is None)
    if trained is not None:
        wanted = {id(parameter) for parameter in trained}
        for own, given in zip(kept.parameters(), model.parameters(), strict=True):
            own.requires_grad_(id(given) in wanted)
    recipe = Recipe().override({"training.distill": 0.5 if teacher else 0.0})
    batch, cpu = (images, torch.zeros(len(images), dtype=torch.long)), torch.device("cpu")
    with Trainer(kept, recipe, correction_of(recipe), cpu, 1, teacher) as trainer:
        trainer.begin_epoch()
        trainer.step([batch], Tally(), 0, measure=False)
        return seconds(lambda: trainer.step([batch], Tally(), 1, measure=False))


def measure(name: str, bits: int, folder: Path) -> dict[str, object]:
    """One model's row."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name).eval().to(memory_format=torch.channels_last)
    preprocessing = Preprocessing.from_dict(timm.data.resolve_model_data_config(model))
    images = torch.randn(IMAGES, *preprocessing.input_size)
    paths = {kind: folder / f"{kind}.onnx" for kind in ("float", "quantized")}
    in_float = evaluation(model, images)
    teacher = copy.deepcopy(model).requires_grad_(False)
    whole = step(model, images)
    head = step(model, images, list(model.get_classifier().parameters()))  # type: ignore[operator]
    exports = [seconds(lambda: export_onnx(copy.deepcopy(model), paths["float"], preprocessing))]
    convert(model, plan_conversion(model, images[:2], bits, bits))
    calibrate(model, [images[:2]])
    in_training = evaluation(model.eval(), images)
    discrete = step(model, images, teacher=teacher)
    deployed = deploy(model)
    exports += [seconds(lambda: export_onnx(deployed, paths["quantized"], preprocessing))]
    file = evaluation(onnx_predictor(paths["float"]), images)
    files = [
        evaluation(onnx_predictor(paths["quantized"], optimize=o), images) for o in (True, False)
    ]
    return {
        "model": name,
        "HOLDOUT": round(in_training / in_float, 2),
        "DEPLOYED": round(evaluation(deployed, images) / in_float, 2),
        "FILE": round(sum(files) / file, 2),
        "EXPORT": round(exports[1] / exports[0], 2),
        "DISCRETE_STEP": round(discrete / whole, 2),
        "WHOLE_STEP": round(whole / head, 2),
    }


def main() -> None:
    """Print a JSON object a line, a model each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="timm model names")
    parser.add_argument("--bits", type=int, default=4)
    options = parser.parse_args()
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(name, options.bits, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
