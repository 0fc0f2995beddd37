"""Put the weights of a finished float run into the package: `python tests/support/bundle.py RUN`.

Weights of layers are stored in half precision, for a small package; the network computes in float32
as always.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ricciq.models.bundled import BUNDLED
from ricciq.system.tensor_files import load_tensors, save_tensors


def bundle(run: Path) -> Path:
    """Write a run's weights to the package; their path there."""
    tensors, metadata = load_tensors(run / "best.safetensors")
    layers = {name: tensor.half() for name, tensor in tensors.items() if tensor.ndim > 1}
    path = BUNDLED / f"{metadata['recipe']['model']['name']}.safetensors"
    save_tensors(path, tensors | layers, metadata)
    return path


if __name__ == "__main__":
    print(bundle(Path(sys.argv[1])))
