"""What opening a data folder of ImageNet's size takes: CPU seconds and memory, only prints.

    python tests/benchmarks/scale.py /tmp/scale

A folder of 1,000 classes with 1,280,000 training and 50,000 validation images is made of hard links
to one small image for each class, opened in a process of its own, and deleted. With `--keep` it
stays, to train on: `ricciq quantize MODEL --data /tmp/scale`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))

from linked import make_folder


def measure(root: Path) -> dict[str, float]:
    """Open the folder, and take one batch of images from it."""
    from ricciq.data.open import open_data
    from ricciq.data.preprocessing import Preprocessing

    def used() -> tuple[float, float, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, time.perf_counter()

    cpu, megabytes, started = used()
    data = open_data(str(root))
    opened = used()
    preprocessing = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    loader = data.loader("fit", preprocessing, batch_size=64, training=True)
    images, _ = next(iter(loader))
    return {
        "training_images": len(loader.dataset),  # type: ignore[arg-type]
        "cpu_seconds": opened[0] - cpu,
        "seconds": opened[2] - started,
        "megabytes": opened[1] - megabytes,
        "process_megabytes": opened[1],
        "first_batch_cpu_seconds": used()[0] - opened[0],
        "first_batch_images": len(images),
    }


def main() -> None:
    """Make the folder, measure in a fresh process, and delete it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="it must not exist, or must have been kept")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--training", type=int, default=1_280_000)
    parser.add_argument("--validation", type=int, default=50_000)
    parser.add_argument("--keep", action="store_true", help="do not delete the folder")
    parser.add_argument("--only-open", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_open:
        print(json.dumps(measure(options.folder)))
        return
    if not options.folder.exists():
        make_folder(options.folder, options.classes, options.training, options.validation)
    try:
        command = [sys.executable, __file__, str(options.folder), "--only-open"]
        subprocess.run(command, check=True)
    finally:
        if not options.keep:
            shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
