"""Latency of ONNX files on this machine: interleaved rounds, medians, their ratio and spread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ricciq.deploy.session import open_session, picture_input, run_session
from ricciq.errors import UsageError

WARM_UP = 3
_LARGEST_BATCH = 2**31
"""Numbers in a batch: 8 GiB."""


@dataclass(frozen=True)
class Latency:
    """Times of one file, in milliseconds a batch.

    Attributes:
        rounds: in the order they were taken; round i of all files was timed at about one moment.
    """

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Middle of the rounds."""
        return float(np.median(self.rounds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the rounds."""
        return _quartiles(self.rounds)


def _quartiles(values: tuple[float, ...]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


def measure_latency(
    files: Mapping[str, Path], *, batch: int = 1, threads: int = 1, rounds: int = 31
) -> dict[str, Latency]:
    """Time ONNX files on random pictures; they may take inputs of different shapes.

    Args:
        files: ONNX files by name.
        batch: pictures in a call.
        threads: threads onnxruntime may use.
        rounds: timed calls of each file.

    Raises:
        ModelError: a file is missing, cannot be loaded, or takes no pictures.
        UsageError: the batch is too large for any machine.
    """
    random = np.random.default_rng(0)
    calls: dict[str, Callable[[], object]] = {}
    for name, path in files.items():
        session = open_session(path, threads=threads)
        entry = picture_input(session, path)
        if batch * math.prod(entry.size) > _LARGEST_BATCH:
            raise UsageError(f"--batch {batch} is too large for pictures of {path}; give a smaller")
        pictures = random.standard_normal((batch, *entry.size), dtype=np.float32)
        run_session(session, entry.name, pictures, path)
        calls[name] = partial(session.run, None, {entry.name: pictures})
    return interleave(calls, rounds=rounds)


def interleave(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 31
) -> dict[str, Latency]:
    """Time several calls by turns, so that whatever else the machine does hits all of them alike.

    Args:
        calls: what to time, by name; each is called ``rounds`` times after warming up.
        rounds: timed calls of each.
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

    Returns:
        Medians and quartiles of the rounds. ``ratio``, of the medians, says how many times faster
        ``file`` is than ``against``; ``ratio_quartiles`` how far single rounds are from that.

    Raises:
        ModelError: a file is missing, cannot be loaded, or takes no pictures.
        UsageError: the batch is too large for any machine.
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
