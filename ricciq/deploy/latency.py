"""Latency of ONNX files on this machine, measured in interleaved rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ricciq.deploy.session import image_input, open_session, run_session
from ricciq.errors import UsageError

WARM_UP = 3
_LARGEST_BATCH = 2**31
"""Numbers in a batch of inputs, which take 8 GiB."""


@dataclass(frozen=True)
class Latency:
    """Times of one file.

    Attributes:
        rounds: milliseconds of each call, in order. Calls of the same round, of several files,
            directly follow each other.
    """

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the rounds, in milliseconds."""
        return float(np.median(self.rounds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the rounds, in milliseconds."""
        return _quartiles(self.rounds)


def _quartiles(values: tuple[float, ...]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


def measure_latency(
    files: Mapping[str, Path], *, batch: int = 1, threads: int = 1, rounds: int = 31
) -> dict[str, Latency]:
    """Time ONNX files on random images; their inputs may have different shapes.

    Args:
        files: ONNX files by name.
        batch: images in a call.
        threads: threads that onnxruntime may use.
        rounds: timed calls of each file.

    Returns:
        The latency of each file, by name.

    Raises:
        ModelError: a file is missing, cannot be loaded, or does not take images.
        UsageError: a file takes batches of another size, or the batch is too large for any machine.
    """
    random = np.random.default_rng(0)
    calls: dict[str, Callable[[], object]] = {}
    for name, path in files.items():
        session = open_session(path, threads=threads)
        entry = image_input(session, path)
        if entry.batch not in (None, batch):
            raise UsageError(
                f"{path} takes {entry.batch} images in a call, not --batch {batch}; give --batch "
                f"{entry.batch}"
            )
        if batch * math.prod(entry.size) > _LARGEST_BATCH:
            raise UsageError(
                f"--batch {batch} is too large for the images of {path}; give a smaller one"
            )
        shape = (batch, *entry.shape)
        images: np.ndarray[Any, Any]
        if entry.input_type == "uint8":
            images = random.integers(0, 256, shape, dtype=np.uint8)
        else:
            images = random.standard_normal(shape, dtype=np.float32)
        run_session(session, entry.name, images, path)
        calls[name] = partial(session.run, None, {entry.name: images})
    return interleave(calls, rounds=rounds)


def interleave(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 31
) -> dict[str, Latency]:
    """Time several functions in turn, so that other load on the machine affects all alike.

    Args:
        calls: functions by name. Before the first round, each is called a few times to warm up.
        rounds: timed calls of each.

    Returns:
        The latency of each function, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(-WARM_UP, rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: Latency(tuple(t)) for name, t in times.items()}


def bench_files(file: Path, against: Path | None, *, batch: int, threads: int) -> dict[str, Any]:
    """Latencies of one or two files as plain values.

    Args:
        file: an ONNX file.
        against: a file to compare it with, or None.
        batch: images in a call.
        threads: threads that onnxruntime may use.

    Returns:
        Medians and quartiles of the rounds. ``ratio``, of the medians, says how many times faster
        ``file`` is than ``against``; ``ratio_quartiles`` are those of the rounds' ratios.

    Raises:
        ModelError: a file is missing, cannot be loaded, or does not take images.
        UsageError: a file takes batches of another size, or the batch is too large for any machine.
    """
    files = {"file": file} if against is None else {"file": file, "against": against}
    latency = measure_latency(files, batch=batch, threads=threads)
    result: dict[str, Any] = {"batch": batch, "threads": threads}
    for name, path in files.items():
        times = latency[name]
        result[name] = str(path)
        result[f"{name}_ms"] = times.median
        result[f"{name}_quartiles_ms"] = list(times.quartiles)
    if against is not None:
        pairs = zip(latency["against"].rounds, latency["file"].rounds, strict=True)
        result["ratio"] = latency["against"].median / latency["file"].median
        result["ratio_quartiles"] = list(_quartiles(tuple(slow / fast for slow, fast in pairs)))
    return result
