"""Size, fusion, speed and memory of exported timm models against their float ONNX: only prints.

    python tests/benchmarks/export.py resnet18 --bits 2

Weights are random: neither size nor speed depends on them. Latencies come from one interleaved run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch

import ricciq.models.factory  # noqa: F401  registers the bundled nets with timm
from ricciq import calibrate, export_onnx, quantize
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.inspection import inspect_onnx
from ricciq.deploy.latency import measure_latency
from ricciq.deploy.modules import deploy

LOAD = """
import os, sys
import numpy as np, onnxruntime as ort

def resident():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
before = resident()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
shape = [1, *session.get_inputs()[0].shape[1:]]
loaded = resident() - before
session.run(None, {"input": np.zeros(shape, np.float32)})
print(loaded, resident() - before)
"""
"""What a process of its own grows by: once the session is there, and after one picture."""


PROCESSES = 15


def memory(path: Path) -> list[float]:
    """Bytes a file takes once loaded, and after it has run: medians over processes.

    What the allocator gives back of the memory that loading needed differs from one to the next.
    """
    command = [sys.executable, "-c", LOAD, str(path)]
    grown = []
    for _ in range(PROCESSES):
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        grown.append([int(number) for number in printed.split()])
    return [statistics.median(column) for column in zip(*grown, strict=True)]


def measure(name: str, bits: int, threads: int, folder: Path) -> dict[str, object]:
    """One model's row."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    preprocessing = Preprocessing.from_dict(timm.data.resolve_model_data_config(model))
    pictures = torch.randn(2, *preprocessing.input_size)
    names = {"float": name, "quantized": f"{name}-w{bits}", "pixels": f"{name}-w{bits}-uint8"}
    files = {key: folder / f"{file}.onnx" for key, file in names.items()}
    export_onnx(model, files["float"], preprocessing)
    plan = quantize(model, pictures, bits, bits)
    calibrate(model, [pictures])
    deployed = deploy(model)
    export_onnx(deployed, files["quantized"], preprocessing)
    export_onnx(deployed, files["pixels"], preprocessing, input_type="uint8")
    inspection = inspect_onnx(files["quantized"])
    latency = measure_latency(files, threads=threads)
    sizes = {key: path.stat().st_size for key, path in files.items()}
    grown = {key: memory(files[key]) for key in ("float", "quantized")}
    return {
        "model": name,
        "bits": bits,
        "layers": len(plan.layers),
        "fused_convolutions_percent": inspection.fused_share("Conv"),
        "float_bytes": sizes["float"],
        "bytes": sizes["quantized"],
        "size_ratio": sizes["quantized"] / sizes["float"],
        "loaded_ratio": grown["quantized"][0] / grown["float"][0],
        "memory_ratio": grown["quantized"][1] / grown["float"][1],
        "float_ms": latency["float"].median,
        "ms": latency["quantized"].median,
        "speedup": latency["float"].median / latency["quantized"].median,
        "pixels_over_float_input": latency["pixels"].median / latency["quantized"].median,
    }


def main() -> None:
    """Print a JSON object a line, a model each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="timm model names")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, options.bits, options.threads, Path(folder))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
