"""Coverage of timm's model zoo: the smallest model of every timm module goes the whole path.

    python tests/compatibility/zoo.py --output zoo                 # all; again: what is missing
    python tests/compatibility/zoo.py --output zoo --again-failed  # those that failed once more
    python tests/compatibility/zoo.py --output zoo --shard 1/2     # the first half, of two machines
    python tests/compatibility/zoo.py --output zoo --table         # only print what is there

The path is a user's: load a checkpoint, plan, convert, calibrate, train an epoch, export, evaluate
the files with onnxruntime's optimizations off and on, time them, report. A model that fails, hangs
or takes its process down is a row of the table with the cause; `--output` holds a JSON file a row.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.models
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ricciq import Recipe, run
from ricciq.data.open import open_data
from ricciq.deploy.inspection import LayerRow, inspect_onnx
from ricciq.deploy.modules import deploy
from ricciq.deploy.session import open_session, session_predictor
from ricciq.errors import ModelError
from ricciq.evaluation import Predict
from ricciq.models.factory import LoadedModel, load_model
from ricciq.runs.folder import RunFolder
from ricciq.system.files import write_atomically
from ricciq.system.journal import Journal
from ricciq.system.tables import read_csv
from ricciq.workflows.saved import rebuild

Row = dict[str, Any]
BATCH = 8
CLASSES = 10
CONFIDENCE = 10.0
LEARNING_RATE = 1e-4
NUDGE = 1e-5
"""Noise on normalized pictures. A network agrees with its file about as well as it agrees with
itself under this: random networks can turn the last bit of a float into another answer."""
LARGE, SMALLER = 288, (256, 224)
"""A model with pictures larger than this is tried with smaller ones: it is the path that counts."""
COLUMNS = {
    "module": "module",
    "model": "model",
    "parameters": "parameters",
    "converted": "layers",
    "fused_convolutions": "conv. in integers %",
    "fused_linears": "linear in integers %",
    "agreement_off": "agreement off %",
    "agreement": "on %",
    "agreement_nudged": "nudged %",
    "relative_diff": "largest difference / spread",
    "size_ratio": "size x",
    "speedup": "speed x",
    "seconds": "s",
}


def make_pictures(folder: Path, train: int = 3, val: int = 2) -> Path:
    """scikit-learn's digits as a picture folder: so many pictures a class in train/ and val/.

    Each class has its colours, since to random networks shapes alone look all the same.
    """
    digits = load_digits()
    for label in range(CLASSES):
        chosen = digits.images[digits.target == label][: train + val]
        for number, image in enumerate(chosen):
            path = folder / ("train" if number < train else "val") / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            hue = label / CLASSES
            ink = np.array(hsv_to_rgb(hue, 1, 1))
            paper = np.array(hsv_to_rgb(hue + 0.35, 0.8, 0.5))
            share = image.repeat(8, 0).repeat(8, 1)[..., None] / 16
            pixels = 255 * (share * ink + (1 - share) * paper)
            Image.fromarray(np.rint(pixels).astype(np.uint8)).save(path)
    return folder


def load(name: str, input_size: int | None) -> tuple[LoadedModel, int | None]:
    """The float model with random weights, and the input size it needs to be told, if any."""

    def attempt(size: int | None) -> LoadedModel:
        return load_model(
            name,
            num_classes=CLASSES,
            channels=3,
            checkpoint=None,
            pretrained=False,
            input_size=size,
            seed=0,
        )

    loaded = attempt(input_size)
    if input_size is None and loaded.preprocessing.input_size[1] > LARGE:
        for size in SMALLER:
            try:
                return attempt(size), size
            except ModelError:
                continue
    return loaded, input_size


@torch.no_grad()
def enliven(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Make random weights look trained, so that every part of the model reaches its answers.

    Constants get noise (networks start with branches switched off by zeros or 1e-5), every fourth
    BatchNorm channel is negated, its statistics are those of pictures.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            vector = parameter.numel() == max(parameter.shape, default=1)
            off = vector and not name.endswith("bias") and bool(parameter.abs().max() < 0.01)
            parameter.add_(torch.randn_like(parameter) * (0.3 if off else 0.1))
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.affine:
                module.weight[::4] *= -1
            module.reset_running_stats()
            module.momentum = None  # the mean over the batches
    model.train()
    for images, _ in batches:
        model(images)
    model.eval()


@torch.no_grad()
def fit_head(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], head: nn.Module | None = None
) -> None:
    """Let the last layer tell the pictures apart, by ridge regression on what it reads.

    A random one answers every picture nearly alike: agreement would be a matter of nothing or of
    the last float bit. Heads that are not one layer behind a pooling stay as they are.
    """
    if hasattr(model, "get_classifier"):
        head = model.get_classifier()
    if not isinstance(head, nn.Linear | nn.Conv2d) or head.bias is None:
        return
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    targets = []
    for images, labels in batches:
        model(images)
        targets.append(labels)
    hook.remove()
    features = torch.cat(seen)
    if features.shape != (len(torch.cat(targets)), head.weight[0].numel()):
        return
    wanted = nn.functional.one_hot(torch.cat(targets), CLASSES).float() - 1 / CLASSES
    mean = features.mean(0)
    features -= mean
    kernel = features @ features.T
    ridge = 0.1 * kernel.diagonal().mean() * torch.eye(len(kernel))
    weight = (torch.linalg.solve(kernel + ridge, wanted).T @ features) * CONFIDENCE
    head.weight.copy_(weight.view_as(head.weight))
    head.bias.copy_(-weight @ mean)


def try_model(name: str, bits: int, scratch: Path, input_size: int | None = None) -> Row:
    """Send one model down the whole path; whatever goes wrong is in the row."""
    row: Row = {"model": name, "bits": bits, "passed": False}
    started = time.perf_counter()
    try:
        _walk(row, bits, scratch, input_size)
    except Exception as error:  # a failure is a result here
        row |= _failure(error)
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def _walk(row: Row, bits: int, scratch: Path, input_size: int | None) -> None:
    """Fill a row as far as the model comes."""
    torch.manual_seed(0)
    data = open_data(str(make_pictures(scratch / "pictures")), None)
    (model, preprocessing, *_), input_size = load(row["model"], input_size)
    weighted = [n for n, m in model.named_modules() if isinstance(m, _ConvNd | nn.Linear)]
    row["module"] = timm.model_entrypoint(row["model"]).__module__.rpartition(".")[2]
    row["input_size"] = preprocessing.input_size[1]
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())

    loading = {"batch_size": BATCH, "workers": 0, "training": False}
    fit = data.loader("fit", preprocessing, **loading)
    enliven(model, fit)
    fit_head(model, fit)
    checkpoint = scratch / "float.safetensors"
    save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, checkpoint)
    recipe = Recipe.from_values(
        {
            "model": {"name": row["model"], "checkpoint": checkpoint, "pretrained": False},
            "data": {"name": data.name, "batch_size": BATCH, "input_size": input_size},
            "quantization": {"weight_bits": bits, "act_bits": bits},
            "training": {"epochs": 1, "lr": LEARNING_RATE},
            "device": "cpu",
        }
    )
    report, path = run(recipe, scratch / "run", journal=Journal(Console(stderr=True)))

    folder = RunFolder(path)
    deployed = deploy(rebuild(path).model)
    predictors: dict[str, Predict] = {
        "torch": model,
        "float": session_predictor(open_session(folder.float_onnx), folder.float_onnx),
        "quantized": deployed,
        "nudged": lambda images: deployed(images + NUDGE * torch.randn_like(images)),
    }
    with torch.inference_mode():
        pictures = [images for images, _ in data.loader("val", preprocessing, **loading)]
        logits = {key: torch.cat([p(x) for x in pictures]) for key, p in predictors.items()}
    guesses = {key: answers.argmax(1) for key, answers in logits.items()}
    spread = float(logits["torch"].std(0).mean())
    layers = inspect_onnx(folder.onnx).layers
    listed = {layer.name for layer in report.layers} | {kept.name for kept in report.kept}
    loss = float(read_csv(folder.summary)[-1]["train_loss"])
    row |= {
        "converted": len(report.layers),
        "kept": dict(Counter(f"{kept.kind}: {kept.why}" for kept in report.kept)),
        "unlisted": [name for name in weighted if name not in listed],
        "steps": report.training.steps,
        "skipped_steps": report.training.skipped_steps,
        "loss": loss,
        "agreement_off": report.onnx.agreement_unoptimized,
        "agreement": report.onnx.agreement,
        "max_abs_diff": report.onnx.max_abs_diff,
        "relative_diff": report.onnx.max_abs_diff / spread,
        "float_file_diff": float((logits["float"] - logits["torch"]).abs().max()) / spread,
        "spread": spread,
        "top1_float": report.float_.top1,
        "top1": report.onnx.top1,
        "agreement_nudged": 100 * float((guesses["nudged"] == guesses["quantized"]).float().mean()),
        "classes_guessed": len(guesses["quantized"].unique()),
        "fused_convolutions": _fused(layer for layer in layers if layer.operator == "Conv"),
        "fused_linears": _fused(layer for layer in layers if layer.operator != "Conv"),
        "unfused": [layer.name for layer in layers if not layer.fused],
        "size_ratio": report.size.ratio,
        "speedup": report.latency.speedup,
    }
    stepped = report.training.steps > 0 and report.training.skipped_steps == 0
    row["passed"] = bool(report.layers) and stepped and math.isfinite(loss)
    if not row["passed"]:
        row["error"] = f"{len(report.layers)} layers converted, loss {loss}, stepped: {stepped}"


def _fused(layers: Iterable[LayerRow]) -> float | None:
    """Percent of layers that run in integers; None where there is no layer."""
    fused = [layer.fused for layer in layers]
    return 100 * sum(fused) / len(fused) if fused else None


def _failure(error: Exception) -> Row:
    """What went wrong: the sentence, what is at the bottom of it, and where in the package."""
    root: BaseException = error
    while below := root.__cause__ or root.__context__:
        root = below
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).parent.name == "ricciq"]
    stages = [frame.line for frame in ours if Path(frame.filename).name == "pipeline.py"]
    deepest = ours[-1] if ours else frames[-1]
    return {
        "error": f"{type(error).__name__}: {_first_line(error)}",
        "cause": f"{type(root).__name__}: {_first_line(root)}",
        "stage": stages[-1] if stages else "checkpoint",
        "where": f"{Path(deepest.filename).name}:{deepest.lineno} {deepest.name}",
        "traceback": "".join(traceback.format_exception(error))[-8000:],
    }


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:300]


def smallest_models() -> dict[str, str]:
    """The model with the fewest parameters of every timm module."""
    chosen = {}
    for module in timm.list_modules():
        names = [n for n in timm.list_models(module=module) if _is_of_timm(n)]
        names = [n for n in names if not n.startswith("test_")] or names
        if names:
            chosen[module] = min(names, key=_count_parameters)
    return chosen


def _is_of_timm(name: str) -> bool:
    return timm.model_entrypoint(name).__module__.startswith("timm.")


def _count_parameters(name: str) -> float:
    for device in ("meta", "cpu"):  # some models compute with numbers when they are built
        try:
            with torch.device(device):
                model = timm.create_model(name, num_classes=CLASSES)
        except Exception:
            continue
        return sum(parameter.numel() for parameter in model.parameters())
    return math.inf


def modules_without_models() -> list[str]:
    """Files of timm.models that register nothing."""
    files = [m.name for m in pkgutil.iter_modules(timm.models.__path__) if m.name[0] != "_"]
    return sorted(set(files) - set(timm.list_modules()))


def in_own_process(name: str, bits: int, limit: float, file: Path) -> Row:
    """`try_model` in a process whose end, of whatever kind, is a row too."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--one", name, "--bits", str(bits)]
        command += ["--limit", str(limit), "--output", str(file)]
        child = subprocess.run(
            command,
            check=False,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": scratch},
        )
    if not file.is_file():
        lines = child.stderr.strip().splitlines()
        said = next((s for s in lines if "Timeout" in s or "Error" in s), "nothing was said")
        frames = [line.strip() for line in lines if "/ricciq/" in line]
        row = {"model": name, "bits": bits, "passed": False, "seconds": limit}
        row |= {"error": f"the process ended with {child.returncode}: {said}"}
        row |= {"where": frames[0].rpartition("/")[2] if frames else None}
        write_row(file, row | {"traceback": "\n".join(lines)[-8000:]})
    return read_row(file)


def read_row(file: Path) -> Row:
    row: Row = json.loads(file.read_text(encoding="utf-8"))
    return row


def write_row(file: Path, row: Row) -> None:
    write_atomically(file, json.dumps(row, indent=1) + "\n")


def print_table(rows: list[Row]) -> None:
    """All rows as a Markdown table, the failures with their causes, and the totals."""
    print("| " + " | ".join(COLUMNS.values()) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in rows:
        print("| " + " | ".join(_cell(row.get(key)) for key in COLUMNS) + " |")
    for row in rows:
        if not row["passed"]:
            print(f"\nFAILED {row['model']}: {row['error']}")
            print(f"  {row.get('cause')} ({row.get('where')}, in `{row.get('stage')}`)")
        if row.get("unlisted"):
            print(f"\nSILENT {row['model']}: {', '.join(row['unlisted'])}")
    passed = sum(row["passed"] for row in rows)
    print(f"\npassed {passed} of {len(rows)}" + (f" ({passed / len(rows):.1%})" if rows else ""))
    print(f"timm modules without models: {', '.join(modules_without_models())}")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return "" if value is None else str(value)


def main() -> None:
    """Run what has no row yet, then print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help="timm models; one of every module by default")
    parser.add_argument("--output", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--shard", default="1/1", help="I/N: every N-th model from the I-th on")
    parser.add_argument("--limit", type=float, default=900, help="seconds a model")
    parser.add_argument("--again-failed", action="store_true", help="run failed models again")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--one", help="run this model here and write its row to --output")
    options = parser.parse_args()
    if options.one:
        faulthandler.enable()
        faulthandler.dump_traceback_later(options.limit, exit=True)
        with tempfile.TemporaryDirectory() as scratch:
            write_row(options.output, try_model(options.one, options.bits, Path(scratch)))
        return
    rows_folder: Path = options.output / "rows"
    rows_folder.mkdir(parents=True, exist_ok=True)
    if not options.table:
        names = options.models
        if not names:
            chosen = options.output / "models.json"
            if not chosen.is_file():
                write_atomically(chosen, json.dumps(smallest_models(), indent=1))
            names = list(json.loads(chosen.read_text(encoding="utf-8")).values())
        shard, shards = map(int, options.shard.split("/"))
        for name in names[shard - 1 :: shards]:
            file = rows_folder / f"{name}.json"
            if file.is_file() and (read_row(file)["passed"] or not options.again_failed):
                continue
            file.unlink(missing_ok=True)
            row = in_own_process(name, options.bits, options.limit, file)
            print(f"{name}: {'passed' if row['passed'] else row['error']}", flush=True)
    print_table([read_row(file) for file in sorted(rows_folder.glob("*.json"))])


if __name__ == "__main__":
    main()
