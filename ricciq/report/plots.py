"""Plots: seeds and curves of a study; training, geometry and sensitivities of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ricciq.report.charts import COSINE, FEW_POINTS, Row, by_layer, decay_lines
from ricciq.system.files import write_atomically


def draw_seeds(rows: Sequence[Row]) -> Figure:
    """Top-1 of every run as a point, with means as lines.

    Args:
        rows: of rows.csv; a column for each method, a panel for each learning rate.
    """
    scales = sorted({row["lr_scale"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(1.5 + 1.2 * len(methods) * len(scales), 4), layout="constrained")
    panels = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for panel, scale in zip(panels, scales, strict=True):
        for place, method in enumerate(methods):
            mine = (row for row in rows if (row["method"], row["lr_scale"]) == (method, scale))
            values = [row["top1"] for row in sorted(mine, key=lambda row: row["seed"])]
            # A seed has the same position in every column.
            spread = [place + 0.4 * (n / max(len(values) - 1, 1) - 0.5) for n in range(len(values))]
            panel.plot(spread, values, "o", alpha=0.6)
            panel.hlines(fmean(values), place - 0.3, place + 0.3, colors="black")
        panel.set_xticks(range(len(methods)), methods, rotation=20)
        panel.set_title(f"learning rate x {scale:g}" if len(scales) > 1 else "")
    panels[0].set_ylabel("top-1, %")
    return figure


def draw_curves(curves: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Hold-out top-1 over the epochs: the mean over seeds, in a band of one standard deviation.

    Args:
        curves: by method, the values of each run by epoch, percent.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method, lines in curves.items():
        length = max(map(len, lines))
        whole = [line for line in lines if len(line) == length]  # a run that diverged ended early
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
    return figure


def draw_geometry(decay: Sequence[Row], geometry: Sequence[Row]) -> Figure:
    """The perturbation over the flow time, and the cosine over the epochs.

    Args:
        decay: rows of decay.csv.
        geometry: rows of geometry.csv.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _decay_lines(left, decay)
    _cosine_lines(right, geometry)
    return figure


def draw_sensitivity(rows: Sequence[Row]) -> Figure:
    """Loss of each layer over its bits, a line for each layer, with a ring at the bits it got.

    Args:
        rows: of sensitivity.csv.
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
    axes.set_xlabel("bits of the weights of one layer, the rest in float")
    axes.set_ylabel("divergence from the float model, nats")
    if few:
        axes.legend(fontsize="small", frameon=False)
    return figure


def _decay_lines(axes: Axes, rows: Sequence[Row]) -> None:
    layers, law = decay_lines(rows)
    for points in layers:
        axes.semilogy(*zip(*points, strict=True), color="tab:blue", alpha=0.4)
    if law:
        axes.semilogy(*zip(*law, strict=True), "--", color="black", label="slope $-2\\pi^2$")
        axes.legend(frameon=False)
    axes.set_xlabel("flow time (linear flow)")
    axes.set_ylabel("metric off its diagonal")


def _cosine_lines(axes: Axes, rows: Sequence[Row]) -> None:
    for points in by_layer(rows, "epoch", "mismatch_cosine", int):
        marker = "." if len(points) <= FEW_POINTS else ""
        axes.plot(*zip(*points, strict=True), marker=marker, color="tab:red", alpha=0.6)
    axes.set_xlabel("epoch")
    axes.set_ylabel(COSINE)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, atomically.

    Args:
        figure: the figure.
        path: of the file.
    """
    content = BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_atomically(path, content.getvalue())
