"""A head that is new: trained in float first by `quantize`, by hand, or not at all.

    python tests/studies/new_head.py /tmp/new-head --checkpoint fashion_resnet8.safetensors

Fashion-MNIST weights are taken to five of the ten digits, and to colour photographs of Debian's
`tuxpaint-stamps-default` in five classes, at 4 bits. Rows go to FOLDER/rows.csv; what is there is
not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rows import write_rows
from sklearn.datasets import load_digits

from ricciq.recipe.recipe import Recipe

STAMPS = Path("/usr/share/tuxpaint/stamps")
KINDS = ("animals", "food", "plants", "town", "vehicles")


def write_digits(folder: Path) -> None:
    """Write the digits 0 to 4, 40 of each for validation."""
    digits = load_digits()
    for number in range(5):
        for count, index in enumerate(np.flatnonzero(digits.target == number)):
            place = folder / ("val" if count < 40 else "train") / str(number)
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.rint(digits.images[index] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{index}.png")


def write_photographs(folder: Path) -> None:
    """Write small copies of the photographs on white, every fourth for validation."""
    for kind in KINDS:
        for count, path in enumerate(sorted((STAMPS / kind).rglob("*.png"))):
            place = folder / ("val" if count % 4 == 0 else "train") / kind
            place.mkdir(parents=True, exist_ok=True)
            image = Image.open(path).convert("RGBA")
            background = Image.new("RGBA", image.size, "white")
            background.alpha_composite(image)
            background.convert("RGB").resize((36, 36)).save(place / f"{count}.png")


def quantize(model: str, data: Path, output: Path, *options: object) -> dict[str, Any]:
    """The report of a run; one that is finished is not repeated."""
    report = output / "report.json"
    if not report.exists():
        given = ["--data", data, "--output", output, "--overwrite", "--quiet", *options]
        subprocess.run(["ricciq", "quantize", model, *map(str, given)], check=True)
    found: dict[str, Any] = json.loads(report.read_text())
    with (output / "summary.csv").open(newline="") as file:
        *_, last = csv.DictReader(file)
    return found | {"train_loss": float(last["train_loss"])}


def rows(model: str, checkpoint: Path, data: Path, seed: int) -> list[dict[str, Any]]:
    """One seed's row of each way."""
    given = ("--bits", 4, "--seed", seed)
    start, runs = ("--checkpoint", checkpoint), data.parent / f"{data.name}-{seed}"
    by_hand, first, labels = runs / "float", runs / "first", runs / "labels.yaml"
    quantize(model, data, by_hand, *start, "--bits", 32, "--seed", seed)
    reports = {"float first": quantize(model, data, first, *start, *given)}
    recipe = Recipe.load(first / "recipe.yaml")
    recipe = recipe.override({"training.distill": 0.0, "training.float_epochs": 0})
    labels.write_text(recipe.to_yaml())
    reports |= {
        "labels alone": quantize(model, data, runs / "labels", *given, "--recipe", labels),
        "float by hand": quantize(
            model, data, runs / "hand", "--checkpoint", by_hand / "best.safetensors", *given
        ),
    }
    return [
        {
            "setting": f"{model} {data.name} W4A4",
            "method": method,
            "opt": "adamw",
            "seed": seed,
            "judged_on": "validation",
            "top1": report["quantized"]["top1"],
            "loss": report["quantized"]["loss"],
            "train_loss": report["train_loss"],
            "seconds": report["training"]["seconds"],
        }
        for method, report in reports.items()
    ]


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="fashion_resnet8")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    folder, found = options.folder.resolve(), []
    for name, write in (("digits", write_digits), ("photographs", write_photographs)):
        if not (folder / name).exists():
            write(folder / name)
        for seed in range(options.seeds):
            found += rows(options.model, options.checkpoint.resolve(), folder / name, seed)
            write_rows(folder / "rows.csv", found)


if __name__ == "__main__":
    main()
