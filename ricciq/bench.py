"""Latency of ONNX files on this machine: interleaved rounds, medians, and their ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ricciq.errors import ModelError
from ricciq.runtime import open_session

WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """Times of one file, in milliseconds a batch.

    Attributes:
        median: middle of the rounds.
        low: first quartile.
        high: third quartile.
    """

    median: float
    low: float
    high: float


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
    """
    random = np.random.default_rng(0)
    calls: dict[str, Callable[[], object]] = {}
    for name, path in files.items():
        session = open_session(path, threads=threads)
        entry = session.get_inputs()[0]
        shape = [batch, *(n if isinstance(n, int) else 1 for n in entry.shape[1:])]
        feed = {entry.name: random.standard_normal(shape, dtype=np.float32)}
        calls[name] = partial(session.run, None, feed)
        try:
            calls[name]()
        except Exception as error:  # onnxruntime's exceptions share no public base
            reason = " ".join(str(error).split())[:160]
            raise ModelError(
                f"{path} takes no float pictures of shape {shape} ({reason}); give a vision model"
            ) from None
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
    return {
        name: Latency(
            statistics.median(t), float(np.quantile(t, 0.25)), float(np.quantile(t, 0.75))
        )
        for name, t in times.items()
    }


def bench_files(file: Path, against: Path | None, *, batch: int, threads: int) -> dict[str, Any]:
    """Latencies of one or two files as plain values; ``ratio`` says how much faster ``file`` is.

    Raises:
        ModelError: a file is missing or cannot be loaded.
    """
    files = {"file": file} if against is None else {"file": file, "against": against}
    latency = measure_latency(files, batch=batch, threads=threads)
    result: dict[str, Any] = {"batch": batch, "threads": threads}
    for name, path in files.items():
        times = latency[name]
        result[name] = str(path)
        result[f"{name}_ms"] = times.median
        result[f"{name}_quartiles_ms"] = [times.low, times.high]
    if against is not None:
        result["ratio"] = latency["against"].median / latency["file"].median
    return result
