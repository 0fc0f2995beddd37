"""The cost of correcting gradients in a training step of a timm model, printed.

    python tests/benchmarks/correction.py resnet50 --batch 32 --methods ricci,project

Whole steps (forward, backward, correction, optimizer) with the straight-through estimator and with
each method alternate in one run, each with its own copy of the model. The share is the additional
time of the method's step, relative to that step.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq import calibrate, quantize
from ricciq.estimators.apply import ActivationCorrection
from ricciq.recipe import Recipe
from ricciq.training.loop import correction_of
from ricciq.training.step import discrete_weights
from ricciq.workflows.compare import Trial

WARM_UP = 2


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of some work, including what it starts on a GPU."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


class Training:
    """A copy of a model that is trained with a method."""

    def __init__(self, model: nn.Module, method: str) -> None:
        recipe = Trial(method, 1.0, 0).recipe(Recipe())
        self.model = copy.deepcopy(model).train()
        self.correction = correction_of(recipe)
        if self.correction.target != "weights":
            ActivationCorrection(self.model, self.correction.estimator)
        self.weights = discrete_weights(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def step(self, images: Tensor, targets: Tensor) -> None:
        """A step as in the training loop."""
        half = torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda)
        with half:
            loss = F.cross_entropy(self.model(images).float(), targets)
        loss.backward()
        self.correction(self.weights, progress=0.5)
        with self.correction.step_bound.around(self.weights):
            self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--methods", default="ricci")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    model = timm.create_model(options.model).to(device, memory_format=torch.channels_last)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images = torch.randn(options.batch, *size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(options.batch, dtype=torch.long, device=device)
    quantize(model.eval(), images[:2], weight_bits=options.bits, act_bits=options.bits)
    calibrate(model, [images[:2]])
    methods = ["ste", *options.methods.split(",")]
    trainings = {method: Training(model, method) for method in methods}
    seconds = defaultdict(list)
    for number in range(WARM_UP + options.rounds):
        for method, training in trainings.items():
            taken = timed(lambda it=training: it.step(images, targets), device)
            if number >= WARM_UP:
                seconds[method].append(taken)
    for method in methods[1:]:
        shares = [1 - a / b for a, b in zip(seconds["ste"], seconds[method], strict=True)]
        low, share, high = statistics.quantiles(shares, n=4)
        row = {
            "model": options.model,
            "batch": options.batch,
            "device": str(device),
            "method": method,
            "ste_ms": 1000 * statistics.median(seconds["ste"]),
            "step_ms": 1000 * statistics.median(seconds[method]),
            "share": share,
            "share_quartiles": [low, high],
        }
        print(
            json.dumps(row)
            if options.json
            else f"{method}: {row['step_ms']:.0f} ms against {row['ste_ms']:.0f} ms, "
            f"{100 * share:.2f} % of it (quartiles {100 * low:.2f} to {100 * high:.2f})"
        )


if __name__ == "__main__":
    main()
