"""CPU seconds of quantization without training beside onnxruntime's `quantize_static`: only prints.

    python tests/benchmarks/without_training.py tf_efficientnet_lite0 resnet50 --bits 8

Both quantize the same float network with the same images, which are noise, as are the weights: the
time does not depend on them. They take turns; a ratio is the median over rounds of two times of the
same round. Ours is the search for scales, the two passes and what is learned; theirs is
`quantize_static` with min-max ranges and a scale for each channel, an image at a time, as its
examples do. Neither reads images from files. `--sensitivity` measures what `--bits auto` does
before it chooses, and `--scales` the search for the scales of weights alone, beside one that tries
all candidates.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import Tensor, nn

from ricciq.convert.plan import Plan, plan_conversion
from ricciq.convert.rewrite import convert
from ricciq.convert.sensitivity import estimate_sensitivity
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.export import export_onnx
from ricciq.quant import scale_search
from ricciq.quant.config import LSQ
from ricciq.quant.grid import UniformGrid
from ricciq.system.allocator import keep_freed_memory
from ricciq.system.journal import Journal
from ricciq.training.reconstruction import reconstruct

STEPS, CANDIDATES = 200, 100


class Images(CalibrationDataReader):  # type: ignore[misc]
    """One image at a time, for onnxruntime."""

    def __init__(self, images: Tensor) -> None:
        self.left: Iterator[dict[str, np.ndarray]] = (
            {"input": image.contiguous().numpy()} for image in images.split(1)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input, or None at the end."""
        return next(self.left, None)


def cpu_seconds(job: Callable[[], object]) -> float:
    """Time of all threads of this process."""
    began = time.process_time()
    job()
    return time.process_time() - began


def ours(model: nn.Module, plan: Plan, images: Tensor) -> None:
    """Quantize a copy of a float network."""
    net = convert(copy.deepcopy(model), plan)
    reconstruct(net, [images], STEPS, Journal())


def theirs(path: Path, images: Tensor) -> None:
    """Quantize a float file."""
    quantize_static(path, path.with_suffix(".int8"), Images(images), per_channel=True)


def compare_searches(name: str, model: nn.Module, options: argparse.Namespace) -> None:
    """Print the time and the squared error of our search for scales, and of the exhaustive one."""
    weights = [p.detach().flatten(1) for p in model.parameters() if p.dim() > 1]
    grid = UniformGrid.for_weights(options.bits)

    def search(short: int, found: list[Tensor]) -> None:
        scale_search.SHORT = short  # of shorter rows, all candidates are tried
        found[:] = [scale_search.best_scales(rows, grid, CANDIDATES) for rows in weights]

    def error(scales: list[Tensor]) -> float:
        pairs = zip(weights, scales, strict=True)
        return float(sum((grid.round(w / s) * s - w).square().sum() for w, s in pairs))

    ratios, few, all_of_them = [], list[Tensor](), list[Tensor]()
    usual = scale_search.SHORT
    for number in range(options.rounds):
        ours = cpu_seconds(lambda: search(usual, few))
        exhaustive = cpu_seconds(lambda: search(sys.maxsize, all_of_them))
        ratios.append(ours / exhaustive)
        print(f"{name} round {number}: {ours:.2f} and {exhaustive:.2f} CPU s", flush=True)
    print(
        f"{name} W{options.bits}: {median(ratios):.3f} of the time of trying all, "
        f"{error(few) / error(all_of_them):.5f} times its error"
    )


def measure(name: str, options: argparse.Namespace) -> None:
    """Print the figures of a network."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(memory_format=torch.channels_last)
    size = tuple(timm.data.resolve_model_data_config(model)["input_size"])
    images = torch.randn(options.images, *size).to(memory_format=torch.channels_last)
    plan = plan_conversion(model, images[:2], options.bits, options.act_bits)
    if options.scales:
        compare_searches(name, model, options)
        return
    if options.sensitivity:
        names = [layer.name for layer in plan.layers[1:-1]]
        began = time.perf_counter()
        used = cpu_seconds(
            lambda: estimate_sensitivity(model, plan, names, LSQ, [images], Journal())
        )
        print(f"{name}: {used:.0f} CPU s, {time.perf_counter() - began:.0f} s")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        export_onnx(copy.deepcopy(model), path, Preprocessing(size, (0.5,) * 3, (0.5,) * 3))
        ratios = []
        for number in range(options.rounds):
            mine = cpu_seconds(lambda: ours(model, plan, images))
            other = cpu_seconds(lambda: theirs(path, images))
            ratios.append(mine / other)
            print(f"{name} round {number}: {mine:.1f} and {other:.1f} CPU s", flush=True)
        bits = f"W{options.bits}A{options.act_bits}"
        print(f"{name} {bits}, {options.images} images: {median(ratios):.2f} times onnxruntime's")


def main() -> None:
    """Measure each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="+", help="of timm networks")
    parser.add_argument("--bits", type=int, default=8, help="of weights")
    parser.add_argument("--act-bits", type=int, default=8, help="of activations")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sensitivity", action="store_true")
    parser.add_argument("--scales", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    keep_freed_memory()  # as the commands do
    for name in options.names:
        measure(name, options)


if __name__ == "__main__":
    main()
