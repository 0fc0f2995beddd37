"""Seconds from the command to its plan, and to its first training step: only prints.

    python tests/benchmarks/start.py --against ../before --rounds 5

The plan is resnet50's, W2 A2. Training is resnet18's, W4 A4, from a checkpoint of random weights,
with 64 images for training and as many for validation. Each command is a process of its own, in
turn with the same command of another clone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import timm
import torch
from PIL import Image

HERE = Path(__file__).parent.parent.parent
IMAGES, CLASSES, PIXELS = 64, 4, 300
RECIPE = """
data: {batch_size: 8}  # a short first step
training: {save_minutes: 0, epochs: 1}
"""
Times = dict[str, float]


def make_inputs(folder: Path) -> None:
    """Write images, a checkpoint, and a recipe that saves the state after every step."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(IMAGES):
            path = folder / "images" / split / f"class{number % CLASSES}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(random.integers(0, 256, (30, 30, 3), dtype=np.uint8))
            coarse.resize((PIXELS, PIXELS)).save(path)
    torch.manual_seed(0)
    weights = timm.create_model("resnet18", num_classes=CLASSES).state_dict()
    torch.save(weights, folder / "resnet18.pt")
    (folder / "recipe.yaml").write_text(RECIPE)


def begin(tree: Path, *words: str | Path) -> subprocess.Popen[bytes]:
    """Start a command of a clone, in it."""
    command = [sys.executable, "-m", "ricciq", *map(str, words), "--quiet"]
    # Python looks in the working directory first.
    return subprocess.Popen(command, cwd=tree)


def plan(tree: Path, folder: Path) -> Times:
    """Of a whole dry run."""
    began = time.perf_counter()
    words = ["quantize", "resnet50", "--bits", "2", "--data", folder / "images", "--dry-run"]
    process = begin(tree, *words)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    return {"wall": time.perf_counter() - began, "cpu": used.ru_utime + used.ru_stime}


def first_step(tree: Path, folder: Path) -> Times:
    """To the beginning of the first step: until the state is saved, less what the step took."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        state = Path(place) / "run" / "state.json"
        words = ["quantize", "resnet18", "--bits", "4", "--data", folder / "images"]
        words += ["--checkpoint", folder / "resnet18.pt", "--recipe", folder / "recipe.yaml"]
        process = begin(tree, *words, "--output", state.parent)
        while not state.exists():
            assert process.poll() is None
            time.sleep(0.005)
        wall = time.perf_counter() - began
        used = psutil.Process(process.pid).cpu_times()
        process.kill()
        process.wait()
        step = json.loads(state.read_text())["tally"]["seconds"]
    return {"wall": wall - step, "cpu": used.user + used.system}  # the latter with the step


def main() -> None:
    """Print a JSON object a line: medians over the rounds, and the ratio to the other clone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another clone, such as of an older version")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["plan", "first_step"])
    options = parser.parse_args()
    trees = {"this": HERE, **({"other": options.against} if options.against else {})}
    measures: list[Callable[[Path, Path], Times]] = [plan, first_step]
    with tempfile.TemporaryDirectory() as place:
        make_inputs(Path(place))
        for measure in measures:
            if options.only not in (None, measure.__name__):
                continue
            found: dict[str, list[Times]] = {name: [] for name in trees}
            for _ in range(options.rounds):
                for name, tree in trees.items():
                    found[name].append(measure(tree, Path(place)))
            row: dict[str, object] = {"what": measure.__name__, "load": os.getloadavg()[0]}
            for name, times in found.items():
                for kind in times[0]:
                    row[f"{name}_{kind}"] = round(statistics.median(t[kind] for t in times), 2)
            if options.against:
                for kind in ("wall", "cpu"):
                    pairs = zip(found["this"], found["other"], strict=True)
                    ratio = statistics.median(this[kind] / other[kind] for this, other in pairs)
                    row[f"{kind}_ratio"] = round(ratio, 3)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
