"""A training step of float, of ours and of Brevitas: time, images a second, peak memory.

    python tests/bench/train_step.py resnet18 --batch 32
    python tests/bench/train_step.py resnet50 --batch 256 --device cuda --amp
    python -m venv brevitas && brevitas/bin/pip install timm brevitas
    python tests/bench/train_step.py resnet18 --batch 32 --brevitas brevitas/bin/python

Every variant is a process of its own, so that its peak memory is its own; in every round each takes
one step, one after the other, while the others wait. A ratio is the median over rounds of two times
of the same round. All but Brevitas run `ricciq.trainer.Trainer.step`, so its checks and its
optimizer (SGD with momentum) are in every time; Brevitas' step has forward, backward and optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

VARIANTS = {
    "float": (),
    "float, compiled": ("compile",),
    "ste": ("discrete",),
    "ste, compiled": ("discrete", "compile"),
    "ricci": ("discrete", "ricci"),
    "ricci, compiled": ("discrete", "ricci", "compile"),
    "ricci and teacher": ("discrete", "ricci", "teacher"),
    "ricci and teacher, compiled": ("discrete", "ricci", "teacher", "compile"),
    "brevitas": ("brevitas",),
}
BITS, CLASSES, WARM_UP = 2, 1000, 3
RATIOS = [
    ("ricci, compiled", "float, compiled"),
    ("ricci", "float"),
    ("ricci, compiled", "ste, compiled"),
    ("ricci", "ste"),
    ("brevitas", "ricci, compiled"),
    ("brevitas", "ricci"),
]


def ours(options: argparse.Namespace, traits: list[str]) -> Callable[[], None]:
    """A step of ricciq's trainer on a converted model, or a float one."""
    import timm
    import torch

    import ricciq.models  # noqa: F401  registers the nets with timm
    from ricciq.calibration import calibrate
    from ricciq.convert import convert, plan_conversion
    from ricciq.history import Tally
    from ricciq.preparation import correction_of
    from ricciq.recipe import Recipe
    from ricciq.trainer import Trainer

    device = torch.device(options.device)
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=CLASSES).to(device)
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(options.batch, *options.size, device=device)
    targets = torch.randint(CLASSES, (options.batch,))  # as loaders give them
    teacher = None
    if "teacher" in traits:
        teacher = timm.create_model(options.model, num_classes=CLASSES).to(device).eval()
        teacher = teacher.to(memory_format=torch.channels_last)
    if "discrete" in traits:
        convert(model, plan_conversion(model.eval(), images[:2], BITS, BITS))
        calibrate(model, [images[:8]])
    method = "ricci" if "ricci" in traits else "ste"
    recipe = Recipe().override(
        {
            "method.name": method,
            "training": {"opt": "momentum", "lr": 1e-4, "epochs": 1},
            "compile": "compile" in traits,
            "amp": options.amp,
        }
    )
    trainer = Trainer(model, recipe, correction_of(recipe), device, 1_000_000, teacher)
    trainer.begin_epoch()
    tally, taken = Tally(), iter(range(1_000_000))

    def step() -> None:
        trainer.step([(images, targets)], tally, next(taken), measure=False)

    return step


def brevitas(options: argparse.Namespace, traits: list[str]) -> Callable[[], None]:  # noqa: ARG001
    """A step of the same model in Brevitas: steps a channel for weights, learned for inputs."""
    import timm
    import torch
    from brevitas import nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
    from torch import nn

    def replace(module: nn.Module, edges: tuple[nn.Module, ...]) -> None:
        for name, child in module.named_children():
            bits = 8 if child in edges else BITS
            quantizers = {
                "weight_quant": Int8WeightPerChannelFloat,
                "weight_bit_width": bits,
                "input_quant": Uint8ActPerTensorFloat,
                "input_bit_width": bits,
            }
            made: nn.Module
            if type(child) is nn.Conv2d:
                made = qnn.QuantConv2d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size,
                    stride=child.stride,
                    padding=child.padding,
                    dilation=child.dilation,
                    groups=child.groups,
                    bias=child.bias is not None,
                    **quantizers,
                )
            elif type(child) is nn.Linear:
                made = qnn.QuantLinear(
                    child.in_features, child.out_features, child.bias is not None, **quantizers
                )
            else:
                replace(child, edges)
                continue
            setattr(module, name, made)

    device = torch.device(options.device)
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=CLASSES)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    replace(model, (layers[0], layers[-1]))
    model = model.to(device).to(memory_format=torch.channels_last).train()
    images = torch.randn(options.batch, *options.size, device=device)
    images = images.to(memory_format=torch.channels_last)
    targets = torch.randint(CLASSES, (options.batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)

    def step() -> None:
        amp = torch.autocast(device.type, torch.bfloat16) if options.amp else nullcontext()
        with amp:
            loss = nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def serve(options: argparse.Namespace) -> None:
    """Take a step for each line that comes in, and say how long it took; at the end, the memory."""
    import resource

    import torch

    torch.set_num_threads(options.threads)
    on_cuda = options.device.startswith("cuda")
    traits = list(VARIANTS[options.variant])
    step = (brevitas if "brevitas" in traits else ours)(options, traits)
    for _ in range(WARM_UP):
        step()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        if on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if on_cuda else peak
        print(json.dumps({"ms": 1000 * seconds, "peak_bytes": peak}), flush=True)


def start(options: argparse.Namespace, variant: str) -> subprocess.Popen[str]:
    python = options.brevitas if variant == "brevitas" else sys.executable
    arguments = [*sys.argv[1:], "--variant", variant]
    return subprocess.Popen(
        [str(python), str(Path(__file__).absolute()), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
    )


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a process ended with {process.wait()}; its message is above")
    values: dict[str, Any] = json.loads(line)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, nargs=3, default=(3, 224, 224))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--brevitas", type=Path, help="interpreter that has timm and brevitas")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="variants; all if left out")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        serve(options)
        return
    names = [name for name in options.only or VARIANTS if name != "brevitas" or options.brevitas]
    processes = {}
    for name in names:  # one after the other: compilers take every core
        processes[name] = start(options, name)
        answer(processes[name])
        print(f"{name} is ready", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks = {}
    for _ in range(options.rounds):
        for name, process in processes.items():
            print("step", file=process.stdin, flush=True)
            values = answer(process)
            times[name].append(values["ms"])
            peaks[name] = values["peak_bytes"]
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    print(
        f"| {options.model}, batch {options.batch}, {options.device} | ms | images/s | peak, GB |"
    )
    print("|---|---|---|---|")
    rows = {}
    for name in names:
        ms = median(times[name])
        rows[name] = {"ms": ms, "images_per_second": 1000 * options.batch / ms}
        rows[name]["peak_bytes"] = peaks[name]
        rate = rows[name]["images_per_second"]
        print(f"| {name} | {ms:.0f} | {rate:.0f} | {peaks[name] / 1e9:.2f} |")
    ratios = {}
    for name, other in RATIOS:
        if name in times and other in times:
            pairs = zip(times[name], times[other], strict=True)
            ratio = median(a / b for a, b in pairs)
            memory = peaks[name] / peaks[other]
            ratios[f"{name} / {other}"] = {"time": ratio, "memory": memory}
            print(f"{name} / {other}: {ratio:.2f} x time, {memory:.2f} x memory")
    if options.json:
        about = {**vars(options), "brevitas": str(options.brevitas), "json": str(options.json)}
        found = {"options": about, "times_ms": times, "rows": rows, "ratios": ratios}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
