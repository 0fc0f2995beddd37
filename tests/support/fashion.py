"""Fashion-MNIST from Debian's package dataset-fashion-mnist, laid out as torchvision expects it.

Run as a script, `python tests/support/fashion.py DIR` prints the folder to give to --data-dir.
"""

import gzip
import shutil
import sys
from pathlib import Path

import pytest

PACKAGE = Path("/usr/share/datasets/fashion-mnist")
FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
FASHION_AVAILABLE = all((PACKAGE / f"{name}.gz").is_file() for name in FILES)

needs_fashion = pytest.mark.skipif(
    not FASHION_AVAILABLE, reason="needs Fashion-MNIST: apt-get install dataset-fashion-mnist"
)


def lay_out_fashion_mnist(target: Path) -> Path:
    """Decompress the four files under `target` and return it, ready for --data-dir."""
    raw = target / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        with gzip.open(PACKAGE / f"{name}.gz") as packed, (raw / name).open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/support/fashion.py DIR")
    if not FASHION_AVAILABLE:
        sys.exit(f"{PACKAGE} is missing: apt-get install dataset-fashion-mnist")
    print(lay_out_fashion_mnist(Path(sys.argv[1])))
