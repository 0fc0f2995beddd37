"""`quantize resnet50 --bits 2` on a folder of JPEGs: is the GPU fed, and how long is it not?"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from jobs import quantize
from parts import Context, Tell
from PIL import Image
from safetensors.torch import save_file

from ricciq.training.metrics import Tally
from ricciq.training.step import Trainer

CLASSES = 20
STEPS, WARM_UP, ALONE = 150, 50, 30
"""Steps that are looked at, those of them that are left out, and those on a batch that is there.

While the first step compiles, workers fill their queues with two batches each: these are left out.
"""


def _write_image(folder: Path, number: int) -> Path:
    """A JPEG as a camera's, cut to ImageNet's usual size: soft shapes, and noise over them."""
    draw = np.random.default_rng(number)
    width, height = (int(side) for side in draw.integers(330, 500, 2))
    coarse = Image.fromarray(draw.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    pixels = pixels + draw.normal(0, 9, pixels.shape).astype(np.int16)
    path = folder / f"{number:06}.jpg"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path


def make_folder(root: Path, images: int, training: int, validation: int) -> None:
    """A folder data set of so many different images, which come several times in training."""
    pool = root / "pool"
    pool.mkdir(parents=True)
    with ProcessPoolExecutor() as processes:
        files = list(processes.map(partial(_write_image, pool), range(images), chunksize=16))
    for split, count in (("train", training), ("val", validation)):
        for number in range(count):
            folder = root / "data" / split / f"class{number % CLASSES:02}"
            folder.mkdir(parents=True, exist_ok=True)
            os.link(files[number % images], folder / f"{number:06}.jpg")


class MeasuredError(Exception):
    """Ends a run whose steps are measured."""


class Watch:
    """Stands in the place of a trainer's step, and notes when it is entered and left.

    After the last step of the run, more are taken on its batch: the step without a loader.
    """

    def __init__(self, tell: Tell, batch_size: int, steps: int, warm_up: int, alone: int) -> None:
        self.tell, self.batch_size = tell, batch_size
        self.steps, self.warm_up, self.alone = steps, warm_up, alone
        self.entered: list[float] = []
        self.left: list[float] = []
        self.step = Trainer.step
        self.found: dict[str, Any] = {}

        def noted(*arguments: Any, **named: Any) -> bool:  # a function, so that it gets the trainer
            return self(*arguments, **named)

        Trainer.step = noted  # type: ignore[method-assign]

    def __call__(self, trainer: Any, batches: Sequence[Any], *others: Any, **named: Any) -> bool:
        """A step, noted."""
        self.entered.append(time.perf_counter())
        finite = self.step(trainer, batches, *others, **named)
        if len(self.entered) == self.steps:
            _wait_for(trainer.device)
        self.left.append(time.perf_counter())
        if len(self.entered) == self.steps:
            self._judge(trainer, batches)
        return finite

    def _judge(self, trainer: Any, batches: Sequence[Any]) -> None:
        first = self.warm_up
        seconds = self.left[-1] - self.left[first - 1]
        pairs = zip(self.entered[first:], self.left[first - 1 :], strict=False)
        waits = [entered - left for entered, left in pairs]
        self.found = {
            "images_per_second": self.batch_size * (self.steps - first) / seconds,
            "seconds": seconds,
            "waiting_seconds": sum(waits),
            "first_steps_seconds": self.left[first - 1] - self.entered[0],
        }
        self.tell({**self.found, "lines": [self.line]})
        images, targets = batches[0]
        there = [(images.to(trainer.device), targets)]
        times = []
        for _ in range(3):
            _wait_for(trainer.device)
            started = time.perf_counter()
            for number in range(self.alone):
                self.step(trainer, there, Tally(), self.steps + number, measure=False)
            _wait_for(trainer.device)
            times.append((time.perf_counter() - started) / self.alone)
        alone = self.batch_size / statistics.median(times)
        self.found |= {
            "alone_images_per_second": alone,
            "of_alone": self.found["images_per_second"] / alone,
        }
        self.tell({**self.found, "lines": [self.line]})
        raise MeasuredError  # the main job shows the rest

    @property
    def line(self) -> str:
        """What was found."""
        found = self.found
        waited = f"waited {found['waiting_seconds']:.2f} s of {found['seconds']:.2f} s for images"
        fed = f"{found['images_per_second']:.0f} images/s from the loader, {waited}"
        if "of_alone" not in found:
            return fed
        share = f"{100 * found['of_alone']:.0f} %"
        return f"{fed}; {found['alone_images_per_second']:.0f} for the step alone ({share})"


def _wait_for(device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def quantize_folder(context: Context, tell: Tell) -> None:
    """Make the folder and the checkpoint, run, and compare with the step alone."""
    tiny = context.tiny
    model, batch_size = ("digits_resnet8", 4) if tiny else ("resnet50", 256)
    steps, warm_up, alone = (6, 2, 2) if tiny else (STEPS, WARM_UP, ALONE)
    # One batch more: the last step of an epoch, which measures the geometry, is not looked at.
    wanted = round(batch_size * (steps + 1.5))
    training = max(round(wanted / 0.95), wanted + CLASSES)  # so many are held out
    make_folder(context.folder, 60 if tiny else 3200, training, 20 if tiny else 200)
    checkpoint = context.folder / "float.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(model, num_classes=CLASSES).state_dict(), checkpoint)
    watch = Watch(tell, batch_size, steps, warm_up, alone)
    fewer = ["--workers", "2"] if tiny else []
    job = [model, "--data", context.folder / "data", "--checkpoint", checkpoint, "--bits", "2"]
    job += ["--batch-size", str(batch_size), *fewer]
    try:
        quantize(context, *job, "--epochs", "1", "--output", context.folder / "run")
    except RuntimeError:
        if "of_alone" not in watch.found:
            raise
