"""Size, fusion and speed of exported timm models against their float ONNX: prints, asserts nothing.

    python tests/bench/export.py resnet18 --bits 2

Weights are random: neither size nor speed depends on them. Latencies come from one interleaved run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import timm
import torch

import ricciq.models  # noqa: F401  registers the bundled nets with timm
from ricciq import calibrate, export_onnx, quantize
from ricciq.bench import measure_latency
from ricciq.export import deploy
from ricciq.inspection import inspect_onnx
from ricciq.preprocessing import Preprocessing


def measure(name: str, bits: int, threads: int, folder: Path) -> dict[str, object]:
    """One model's row."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    preprocessing = Preprocessing.from_dict(timm.data.resolve_model_data_config(model))
    pictures = torch.randn(2, *preprocessing.input_size)
    files = {"float": folder / f"{name}.onnx", "quantized": folder / f"{name}-w{bits}.onnx"}
    export_onnx(model, files["float"], preprocessing)
    plan = quantize(model, pictures, bits, bits)
    calibrate(model, [pictures])
    export_onnx(deploy(model), files["quantized"], preprocessing)
    inspection = inspect_onnx(files["quantized"])
    latency = measure_latency(files, threads=threads)
    sizes = {key: path.stat().st_size for key, path in files.items()}
    return {
        "model": name,
        "bits": bits,
        "layers": len(plan.layers),
        "fused_convolutions_percent": inspection.fused_share("Conv"),
        "float_bytes": sizes["float"],
        "bytes": sizes["quantized"],
        "size_ratio": sizes["quantized"] / sizes["float"],
        "float_ms": latency["float"].median,
        "ms": latency["quantized"].median,
        "speedup": latency["float"].median / latency["quantized"].median,
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
