"""What the correction of gradients costs in a training step of a timm model: only prints.

    python tests/bench/correction.py resnet50 --batch 32 --methods ricci,project

Steps (forward, backward, optimizer) and corrections of the same gradients take turns in one run;
the share is that of a correction in a step with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import timm
import torch
from torch.nn import functional as F

from ricciq import calibrate, quantize
from ricciq.compare import Trial
from ricciq.correction import Correction
from ricciq.estimators import named_estimator
from ricciq.recipe import Recipe
from ricciq.train import discrete_weights

WARM_UP = 2


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds it takes, with what it starts on a GPU."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


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
    optimizer = torch.optim.AdamW(model.train().parameters())
    weights = discrete_weights(model)
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def step() -> None:
        optimizer.zero_grad()
        with half:
            loss = F.cross_entropy(model(images).float(), targets)
        loss.backward()
        optimizer.step()

    corrections = {}
    for method in options.methods.split(","):
        section = Trial(method, 1.0, 0).recipe(Recipe()).method
        corrections[method] = Correction(
            named_estimator(section.name, section.changes), section.target
        )
    seconds = defaultdict(list)
    for number in range(WARM_UP + options.rounds):
        taken = {"step": timed(step, device)}
        for method, correction in corrections.items():
            taken[method] = timed(lambda it=correction: it(weights, progress=0.5), device)
        if number >= WARM_UP:
            for name, value in taken.items():
                seconds[name].append(value)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for method in corrections:
        shares = [c / (c + s) for c, s in zip(seconds[method], seconds["step"], strict=True)]
        row = {
            "model": options.model,
            "batch": options.batch,
            "device": str(device),
            "method": method,
            "step_ms": 1000 * median["step"],
            "correction_ms": 1000 * median[method],
            "share": statistics.median(shares),
            "share_range": [min(shares), max(shares)],
        }
        print(
            json.dumps(row)
            if options.json
            else f"{method}: {row['correction_ms']:.1f} ms of {row['step_ms']:.0f} ms, "
            f"{100 * row['share']:.2f} % ({100 * min(shares):.2f} to {100 * max(shares):.2f})"
        )


if __name__ == "__main__":
    main()
