"""The study: settings, methods, seeds, and a row of a CSV file for every run.

    python tests/support/fashion.py FASHION                               # lays the data out
    python tests/studies/study.py FASHION FLOATS                    # trains float starts, once
    python tests/studies/study.py FASHION FLOATS rows.csv w1a1 ste,ricci:time=0.1
    python tests/studies/study.py FASHION FLOATS confirmed.csv w1a1 ste,ricci --seeds 100-119 --test

Fashion-MNIST's 60,000 training pictures are shuffled once: the first 45,000 train float starts and
give every run its subset, the last 15,000 judge. With `--test` the 10,000 test pictures judge: for
one method, chosen before, and seeds that had no part in the choice. A row is written as soon as its
run ends, and what has a row is not run again. It differs from `ricciq compare` in that pictures
stay in memory and the teacher answers each of them once, which halves the time. A method is
written as for `ricciq compare`; an `@3` behind it stands for three times the learning rate.
`brevitas` is that library's own training with learned steps (see `brevitas_net.py`) in the same
loop; it wants an environment that has both.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import FashionMNIST

import ricciq.models.factory  # noqa: F401  registers the nets with timm
from ricciq.convert.plan import plan_conversion
from ricciq.convert.rewrite import convert
from ricciq.estimators.apply import ActivationCorrection, override_forward
from ricciq.quant.calibration import calibrate
from ricciq.quant.config import QuantizerConfig
from ricciq.quant.grid import Bits
from ricciq.recipe import Recipe
from ricciq.training.loop import correction_of
from ricciq.training.step import discrete_weights
from ricciq.workflows.compare import Trial

TRAINED, BATCH, FLOAT_EPOCHS = 45_000, 128, 10
FIXED, DOREFA = QuantizerConfig("fixed", "fixed"), QuantizerConfig("dorefa", "pact")


class Setting(NamedTuple):
    """What is trained."""

    model: str
    weight_bits: Bits
    act_bits: int
    config: QuantizerConfig = QuantizerConfig()
    scratch: bool = False


SETTINGS = {
    "w1a1": Setting("fashion_resnet8", 1, 1),
    "w1a2": Setting("fashion_resnet8", 1, 2),
    "w2a2": Setting("fashion_resnet8", 2, 2),
    "w4a4": Setting("fashion_resnet8", 4, 4),
    "w1a1-fixed": Setting("fashion_resnet8", 1, 1, FIXED),
    "w1a2-fixed": Setting("fashion_resnet8", 1, 2, FIXED),
    "w2a2-fixed": Setting("fashion_resnet8", 2, 2, FIXED),
    "w2a2-dorefa": Setting("fashion_resnet8", 2, 2, DOREFA),
    "w1a1-scratch": Setting("fashion_resnet8", 1, 1, scratch=True),
    "w1a2-scratch": Setting("fashion_resnet8", 1, 2, scratch=True),
    "w2a2-scratch": Setting("fashion_resnet8", 2, 2, scratch=True),
    "w4a4-scratch": Setting("fashion_resnet8", 4, 4, scratch=True),
    "w2a2-fixed-scratch": Setting("fashion_resnet8", 2, 2, FIXED, scratch=True),
    "mobile-w2a2": Setting("fashion_mobilenet", 2, 2),
    "mobile-w3a3": Setting("fashion_mobilenet", 3, 3),
    "mobile-w4a4": Setting("fashion_mobilenet", 4, 4),
}
COLUMNS = ("setting", "method", "seed", "opt", "lr", "epochs", "samples", "teacher", "judged_on")
RESULTS = ("top1", "loss", "train_loss", "skipped", "seconds")


class Data(NamedTuple):
    """Normalized pictures and their classes; log shares of the teacher for those that train."""

    images: Tensor
    targets: Tensor
    judged_images: Tensor
    judged_targets: Tensor
    taught: Tensor = torch.empty(0)


def load(folder: Path, test: bool = False) -> Data:
    """The training pictures, shuffled always alike, and those that judge."""
    parts = [FashionMNIST(str(folder), train=train) for train in (True, False)]
    images, judged = ((part.data.unsqueeze(1).float() / 255 - 0.2860) / 0.3530 for part in parts)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, targets = images[order], parts[0].targets[order]
    if test:
        return Data(images[:TRAINED], targets[:TRAINED], judged, parts[1].targets)
    return Data(images[:TRAINED], targets[:TRAINED], images[TRAINED:], targets[TRAINED:])


def build(name: str) -> nn.Module:
    """A fresh float net, fast on a CPU."""
    model = timm.create_model(name, in_chans=1, num_classes=10)
    return model.to(memory_format=torch.channels_last)


def last(images: Tensor) -> Tensor:
    """As the nets want them."""
    return images.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Logarithms of the shares of classes."""
    parts = [F.log_softmax(model.eval()(last(part)), 1) for part in images.split(1000)]
    return torch.cat(parts)


def judge(model: nn.Module, images: Tensor, targets: Tensor) -> tuple[float, float]:
    """Top-1 in percent and loss."""
    logs = answers(model, images)
    return 100 * (logs.argmax(1) == targets).float().mean().item(), F.nll_loss(logs, targets).item()


def anneal(optimizer: torch.optim.Optimizer, lr: float, progress: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * (1 + math.cos(math.pi * progress)) / 2


def train_float(name: str, data: Data, target: Path) -> None:
    """A float start, with flips and shifts."""
    images, targets = data.images, data.targets
    torch.manual_seed(0)
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    per_epoch = TRAINED // BATCH
    for epoch in range(FLOAT_EPOCHS):
        model.train()
        for step, chosen in enumerate(torch.randperm(TRAINED).split(BATCH)[:per_epoch]):
            x = images[chosen]
            x = x.flip(-1).where((torch.rand(len(x)) < 0.5)[:, None, None, None], x)
            top, left = torch.randint(0, 5, (2,)).tolist()
            x = F.pad(x, (2, 2, 2, 2), value=-0.81)[..., top : top + 28, left : left + 28]
            anneal(optimizer, 4e-3, (epoch + step / per_epoch) / FLOAT_EPOCHS)
            F.cross_entropy(model(last(x)), targets[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
    top1, _ = judge(model, data.judged_images, data.judged_targets)
    print(f"{name}: {top1:.2f} % of the pictures that judge")
    torch.save(model.state_dict(), target / f"{name}.pt")


def train(
    setting: Setting,
    method: str,
    seed: int,
    options: argparse.Namespace,
    start: dict[str, Tensor],
    data: Data,
) -> tuple[float, ...]:
    """One run; its results."""
    started = time.perf_counter()
    method, _, factor = method.partition("@")
    rate = options.lr * float(factor or 1)
    torch.manual_seed(seed)
    model = build(setting.model)
    if not setting.scratch:
        model.load_state_dict(start)
    recipe = Trial("ste" if method == "brevitas" else method, 1.0, seed).recipe(Recipe())
    correction = correction_of(recipe)
    if method == "brevitas":
        from brevitas_net import discretize

        discretize(model, *setting[1:3])
    else:
        plan = plan_conversion(model.eval(), torch.zeros(2, 1, 28, 28), *setting[1:3])
        convert(model, plan, setting.config)
        calibrate(model, [last(part) for part in data.images[: 4 * BATCH].split(BATCH)])
        override_forward(model, correction)
    beside = None
    if correction.target != "weights":
        beside = ActivationCorrection(model, correction.estimator)
    weights = discrete_weights(model)  # none of Brevitas' layers
    optimizer = create_optimizer_v2(model, opt=options.opt, lr=rate, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(1000 + seed)
    subset = torch.randperm(TRAINED, generator=generator)[: options.samples]
    per_epoch = options.samples // BATCH
    skipped = 0
    for epoch in range(options.epochs):
        model.train()
        total = 0.0
        order = subset[torch.randperm(len(subset), generator=generator)]
        for step, chosen in enumerate(order.split(BATCH)[:per_epoch]):
            progress = (epoch + step / per_epoch) / options.epochs
            anneal(optimizer, rate, progress)
            if beside is not None:
                beside.advance(progress)
            logs = F.log_softmax(model(last(data.images[chosen])), 1)
            hard = F.nll_loss(logs, data.targets[chosen])
            soft = F.kl_div(logs, data.taught[chosen], reduction="batchmean", log_target=True)
            loss = (1 - options.distill) * hard + options.distill * soft
            loss.backward()
            if loss.isfinite():
                correction(weights, progress)
                with correction.step_bound.around(weights):
                    optimizer.step()
                total += loss.item()
            else:
                skipped += 1
            optimizer.zero_grad()
    top1, held = judge(model, data.judged_images, data.judged_targets)
    return top1, held, total / per_epoch, skipped, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fashion", type=Path, help="what tests/support/fashion.py laid out")
    parser.add_argument("floats", type=Path, help="folder of the float starts")
    parser.add_argument("rows", type=Path, nargs="?", help="CSV to add to; none: train the starts")
    parser.add_argument("settings", nargs="?", default="w1a2", help=", ".join(SETTINGS))
    parser.add_argument("methods", nargs="?", default="ste,ricci")
    parser.add_argument("--seeds", default="0-4", help="first and last")
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=15_000)
    parser.add_argument("--distill", type=float, default=1.0, help="the float model's share")
    parser.add_argument("--test", action="store_true", help="the test pictures judge")
    options = parser.parse_args()

    torch.set_num_threads(1)
    data = load(options.fashion, options.test)
    if options.rows is None:
        options.floats.mkdir(parents=True, exist_ok=True)
        for name in sorted({setting.model for setting in SETTINGS.values()}):
            train_float(name, data, options.floats)
        return
    done = set()
    if options.rows.is_file():
        with options.rows.open(newline="") as file:
            done = {tuple(row[name] for name in COLUMNS) for row in csv.DictReader(file)}
    else:
        options.rows.write_text(",".join((*COLUMNS, *RESULTS)) + "\n")
    first, last_seed = map(int, options.seeds.split("-"))
    taught: dict[str, Data] = {}
    teacher = {0.0: False, 1.0: True}.get(options.distill, options.distill)
    judges = "test" if options.test else "holdout"
    for seed in range(first, last_seed + 1):
        for key in options.settings.split(","):
            setting = SETTINGS[key]
            start = torch.load(options.floats / f"{setting.model}.pt", weights_only=True)
            if setting.model not in taught:
                net = build(setting.model)
                net.load_state_dict(start)
                taught[setting.model] = data._replace(taught=answers(net, data.images))
            for method in options.methods.split(","):
                values = (key, method, seed, options.opt, options.lr, options.epochs)
                what = tuple(map(str, (*values, options.samples, teacher, judges)))
                if what not in done:
                    results = train(setting, method, seed, options, start, taught[setting.model])
                    with options.rows.open("a", newline="") as file:
                        csv.writer(file).writerow([*what, *(round(r, 5) for r in results)])


if __name__ == "__main__":
    main()
