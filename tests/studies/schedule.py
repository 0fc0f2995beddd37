"""The schedule that `quantize` derives, beside the plain defaults, on few images.

    python tests/studies/schedule.py FASHION FOLDER

FASHION is what `tests/support/fashion.py` prepares. Of its training images, 45,000 train the float
networks, the first 500 or 5,000 of these the discrete ones, and the other 15,000 judge. Rows go to
FOLDER/rows.csv; runs that are finished are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rows import write_rows

NETWORKS, WIDTHS, COUNTS = ("fashion_resnet8", "fashion_mobilenet"), (2, 4), (500, 5000)
STARTING = 45_000
PLAIN = "ricci:training.epochs=20:training.lr=0.002"
METHODS = {"ricci": "derived", PLAIN: "plain defaults"}


def write_part(fashion: Path, folder: Path, count: int) -> None:
    """Write the first of the shuffled images for training, and the last 15,000 for validation."""
    raw, place = (root / "FashionMNIST" / "raw" for root in (fashion, folder))
    images = np.fromfile(raw / "train-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
    labels = np.fromfile(raw / "train-labels-idx1-ubyte", np.uint8)[8:]
    order = np.random.RandomState(1).permutation(len(labels))
    place.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", order[:count]), ("t10k", order[STARTING:])):
        for kind, data in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            header = np.array([0x800 + data.ndim, *data.shape], ">i4").tobytes()
            (place / f"{name}-{kind}-ubyte").write_bytes(header + data.tobytes())


def train_float(network: str, folder: Path) -> Path:
    """The float network to start from; one that is trained is not trained again."""
    weights = folder / network / "best.safetensors"
    if not weights.exists():
        recipe = folder / f"{network}.yaml"
        values = {
            "model": {"pretrained": False},
            "data": {"batch_size": 128, "augmentation": {"hflip": 0.5, "pad_crop": 2}},
            "quantization": {"weight_bits": 32, "act_bits": 32},
            "training": {"epochs": 6, "lr": 0.004, "weight_decay": 0.02},
        }
        recipe.write_text(yaml.safe_dump(values))
        run(
            *("quantize", network, "--recipe", recipe, "--output", weights.parent),
            *("--data", "torch/fashion_mnist", "--data-dir", folder / str(STARTING)),
        )
    return weights


def run(*words: object) -> None:
    """Run a command of ricciq in one thread."""
    line = ["ricciq", *map(str, words), "--overwrite", "--quiet"]
    subprocess.run(line, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def rows(folder: Path, network: str, bits: int, count: int, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each seed and schedule of a setting."""
    output = folder / f"{network}-{bits}-{count}"
    if not (output / "compare.json").exists():
        run(
            *("compare", network, "--checkpoint", train_float(network, folder), "--bits", bits),
            *("--data", "torch/fashion_mnist", "--data-dir", folder / str(count)),
            *("--methods", ",".join(METHODS), "--seeds", seeds, "--output", output),
        )
    with (output / "rows.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            yield {
                "setting": f"{network} W{bits}A{bits}, {count} images",
                "method": METHODS[row["method"]],
                "opt": "adamw",
                "judged_on": "training images held out",
                **{name: row[name] for name in ("seed", "top1", "loss", "train_loss", "seconds")},
            }


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fashion", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    folder = options.folder.resolve()
    found: list[dict[str, Any]] = []
    for count in (*COUNTS, STARTING):
        write_part(options.fashion, folder / str(count), count)
    for count in COUNTS:
        for bits in WIDTHS:
            for network in NETWORKS:
                found += rows(folder, network, bits, count, options.seeds)
                write_rows(folder / "rows.csv", found)


if __name__ == "__main__":
    main()
