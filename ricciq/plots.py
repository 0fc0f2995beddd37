"""Pictures of numbers: a study's seeds and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from ricciq.checkpoint import write_atomically


def plot_seeds(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Top-1 of every run as a point: a column a method, a panel a learning rate, means as lines."""
    scales = sorted({row["lr_scale"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(1.5 + 1.2 * len(methods) * len(scales), 4), layout="constrained")
    panels = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for panel, scale in zip(panels, scales, strict=True):
        for place, method in enumerate(methods):
            mine = (row for row in rows if (row["method"], row["lr_scale"]) == (method, scale))
            values = [row["top1"] for row in sorted(mine, key=lambda row: row["seed"])]
            # The same seed stands at the same place of every column.
            spread = [place + 0.4 * (n / max(len(values) - 1, 1) - 0.5) for n in range(len(values))]
            panel.plot(spread, values, "o", alpha=0.6)
            panel.hlines(fmean(values), place - 0.3, place + 0.3, colors="black")
        panel.set_xticks(range(len(methods)), methods, rotation=20)
        panel.set_title(f"learning rate x {scale:g}" if len(scales) > 1 else "")
    panels[0].set_ylabel("top-1, %")
    _save(figure, path)


def plot_curves(curves: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Hold-out top-1 over the epochs: the mean over the seeds in a band of one deviation."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method, lines in curves.items():
        length = max(map(len, lines))
        whole = [line for line in lines if len(line) == length]  # one that diverged ended early
        columns = list(zip(*whole, strict=True))
        means = [fmean(column) for column in columns]
        bands = [stdev(column) if len(whole) > 1 else 0.0 for column in columns]
        epochs = range(1, length + 1)
        low = [m - b for m, b in zip(means, bands, strict=True)]
        high = [m + b for m, b in zip(means, bands, strict=True)]
        axes.plot(epochs, means, marker=".", label=f"{method}: {len(whole)} of {len(lines)} runs")
        axes.fill_between(epochs, low, high, alpha=0.2)
    axes.set_xlabel("epoch")
    axes.set_ylabel("hold-out top-1, %")
    axes.legend()
    _save(figure, path)


def plot_geometry(
    times: Sequence[float],
    decay: Mapping[str, Sequence[float]],
    rows: Sequence[Mapping[str, Any]],
    path: Path,
) -> None:
    """What a run's geometry did: its perturbation over the flow time, its mismatch over epochs.

    Args:
        times: of the flow.
        decay: for each layer the norm of the metric off its diagonal, a number a time.
        rows: of geometry.csv.
        path: the picture.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = {name: norms for name, norms in decay.items() if min(norms) > 0}
    for norms in drawn.values():
        left.semilogy(times, norms, color="tab:blue", alpha=0.4)
    if drawn:
        top = max(norms[0] for norms in drawn.values())
        law = [top * math.exp(-2 * math.pi**2 * time) for time in times]
        left.semilogy(times, law, "--", color="black", label="slope -2 pi^2")
        left.legend()
    left.set_xlabel("flow time (linear flow)")
    left.set_ylabel("metric off its diagonal, a line a layer")
    for name in decay:
        mine = [row for row in rows if row["layer"] == name]
        epochs = [int(row["epoch"]) for row in mine]
        cosines = [float(row["mismatch_cosine"]) for row in mine]
        right.plot(epochs, cosines, marker=".", color="tab:orange", alpha=0.5)
    right.set_xlabel("epoch")
    right.set_ylabel("cosine of gradient and corrected gradient")
    _save(figure, path)


def plot_sensitivity(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """What each layer loses at each width, a line a layer, with a ring at the width it got.

    Args:
        rows: of sensitivity.csv.
        path: the picture.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    few = len(rows) <= 20  # a longer legend would cover the lines
    for row in rows:
        lost = {
            int(key.removeprefix("nats_at_")): max(float(value), 1e-9)
            for key, value in row.items()
            if key.startswith("nats_at_")
        }
        label = f"{row['layer']}: {row['bits']} bits" if few else None
        (line,) = axes.semilogy(lost.keys(), lost.values(), alpha=0.6, label=label)
        bits = int(row["bits"])
        axes.plot(bits, lost[bits], "o", mfc="none", markersize=9, color=line.get_color())
    axes.set_xlabel("bits of the weights of one layer, all else in float")
    axes.set_ylabel("divergence from the float answers, nats")
    if few:
        axes.legend(fontsize="small")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    content = BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_atomically(path, content.getvalue())
