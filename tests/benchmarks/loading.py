"""Images per CPU second of ricciq's loader beside timm's, on photographs: only prints.

    python tests/benchmarks/loading.py /usr/share/wallpapers

FOLDER has photographs at any depth, such as those of Debian's packages plasma-workspace-wallpapers
and lomiri-wallpapers. JPEGs of 500 x 375 pixels, ImageNet's usual size, are cut from them. Both
loaders read the same files with the same transforms at 224 pixels: timm's is `create_loader` with
its prefetcher. They take turns; a ratio is the median over rounds of two rates of the same round.
CPU seconds are user and system time of this process and of its workers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_loader

from ricciq.data.augmentation import Augmentation
from ricciq.data.loader import set_epoch
from ricciq.data.open import open_data
from ricciq.data.preprocessing import Preprocessing

SIZE, QUALITY = (500, 375), 92
PREPROCESSING = Preprocessing(
    (3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875
)
AUGMENTATION = Augmentation()
CLASSES = 10
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def cut(source: Path, target: Path, count: int) -> None:
    """Write a data folder of JPEGs: train/ and val/ each have `count`, cut from the photographs."""
    draw, photographs = random.Random(0), []
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not path.is_symlink():
            with Image.open(path) as image:
                if image.width >= 2 * SIZE[0] and image.height >= 2 * SIZE[1]:
                    photographs.append(image.convert("RGB"))
    if not photographs:
        raise SystemExit(f"{source} has no photographs of {2 * SIZE[0]} x {2 * SIZE[1]} pixels")
    for number in range(2 * count):
        photograph = photographs[number % len(photographs)]
        width = draw.uniform(SIZE[0], min(photograph.width, photograph.height * SIZE[0] / SIZE[1]))
        height = width * SIZE[1] / SIZE[0]
        left = draw.uniform(0, photograph.width - width)
        top = draw.uniform(0, photograph.height - height)
        split = "train" if number < count else "val"
        path = target / split / f"class{number % CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        box = (left, top, left + width, top + height)
        photograph.resize(SIZE, Image.Resampling.LANCZOS, box).save(path, quality=QUALITY)


def cpu_seconds() -> float:
    """User and system time of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(loader: Callable[[], Batches], device: torch.device) -> dict[str, float]:
    """Images per CPU second and per second of an epoch, from making the loader to its end."""
    used, started, images = cpu_seconds(), time.perf_counter(), 0
    for batch, _ in loader():
        images += len(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {
        "per_cpu_second": images / (cpu_seconds() - used),
        "per_second": images / (time.perf_counter() - started),
    }


def loaders(folder: Path, training: bool, options: argparse.Namespace) -> dict[str, Any]:
    """A function for each loader that makes it; the data are opened already."""
    split = "train" if training else "val"
    data, theirs = open_data(str(folder)), ImageDataset(str(folder / split))
    epoch = iter(range(10**6))
    device = torch.device(options.device)

    def ours() -> Batches:
        loader = data.loader(
            "fit" if training else "val",
            PREPROCESSING,
            batch_size=options.batch,
            workers=options.workers,
            training=training,
            augmentation=AUGMENTATION if training else None,
            device=device,
        )
        if training:
            set_epoch(loader, next(epoch))
        return loader

    def timms() -> Batches:
        loader: Batches = create_loader(
            theirs,
            PREPROCESSING.input_size,
            options.batch,
            is_training=training,
            scale=AUGMENTATION.scale,
            ratio=AUGMENTATION.ratio,
            hflip=AUGMENTATION.hflip,
            color_jitter=None,  # type: ignore[arg-type]
            interpolation=PREPROCESSING.interpolation,
            mean=PREPROCESSING.mean,
            std=PREPROCESSING.std,
            num_workers=options.workers,
            crop_pct=PREPROCESSING.crop_pct,
            pin_memory=device.type == "cuda",
            device=device,
            persistent_workers=False,
        )
        return loader

    return {"ricciq": ours, "timm": timms}


def compare(folder: Path, training: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Rates of both loaders in rounds, the first of which only warms up."""
    made = loaders(folder, training, options)
    rounds = []
    for number in range(options.rounds + 1):
        order = list(made) if number % 2 else list(made)[::-1]
        found = {name: timed(made[name], torch.device(options.device)) for name in order}
        if number:
            rounds.append(found)
    row: dict[str, Any] = {"transforms": "training" if training else "evaluation"}
    row |= {"workers": options.workers, "batch": options.batch, "device": options.device}
    for key in ("per_cpu_second", "per_second"):
        row |= {f"{name}_{key}": median(found[name][key] for found in rounds) for name in made}
        ratios = [found["ricciq"][key] / found["timm"][key] for found in rounds]
        row |= {f"ratio_{key}": median(ratios), f"ratios_{key}": [min(ratios), max(ratios)]}
    return row


def main() -> None:
    """Print a JSON object for training and one for evaluation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="in train/ and in val/")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cut(options.folder, Path(folder), options.images)
        for training in (True, False):
            print(json.dumps(compare(Path(folder), training, options)), flush=True)


if __name__ == "__main__":
    main()
