"""Plots: seeds and curves of a study; training, geometry and sensitivities of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO, StringIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ricciq.system.files import write_atomically

FEW_EPOCHS = 30
"""Most epochs to draw markers for; more markers would add megabytes to a page."""
COSINE = "cosine of gradient and corrected gradient"


def draw_seeds(rows: Sequence[Mapping[str, Any]]) -> Figure:
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


def draw_decay(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Decay of each layer's perturbation in the linear flow.

    Args:
        rows: of decay.csv.
    """
    figure, axes = _small_figure()
    _decay_lines(axes, rows)
    return figure


def draw_layers(rows: Sequence[Mapping[str, Any]], column: str, label: str) -> Figure:
    """A column of geometry.csv over the epochs, a line for each layer.

    Args:
        rows: of geometry.csv.
        column: the column to draw.
        label: of the vertical axis.
    """
    figure, axes = _small_figure()
    _layer_lines(axes, rows, column, label)
    return figure


def draw_epochs(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], label: str
) -> Figure:
    """Columns of summary.csv over the epochs.

    Args:
        rows: of summary.csv.
        columns: the columns to draw, by their names in the legend.
        label: of the vertical axis.
    """
    figure, axes = _small_figure()
    epochs = [int(row["epoch"]) for row in rows]
    # Colours that are visible on white and on black.
    for color, (name, column) in zip(("tab:blue", "tab:red"), columns.items(), strict=False):
        values = [float(row[column]) for row in rows]
        axes.plot(epochs, values, marker=".", label=name, color=color)
    axes.set_ylabel(label)
    _epochs_below(axes)
    axes.legend(frameon=False)
    return figure


def draw_geometry(
    decay: Sequence[Mapping[str, Any]], geometry: Sequence[Mapping[str, Any]]
) -> Figure:
    """The perturbation over the flow time, and the cosine over the epochs.

    Args:
        decay: rows of decay.csv.
        geometry: rows of geometry.csv.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _decay_lines(left, decay)
    _layer_lines(right, geometry, "mismatch_cosine", COSINE)
    return figure


def draw_sensitivity(rows: Sequence[Mapping[str, Any]]) -> Figure:
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


def _small_figure() -> tuple[Figure, Axes]:
    """A figure that is readable on a phone, where a page is 390 pixels wide."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    return figure, figure.subplots()


def _by_layer(
    rows: Sequence[Mapping[str, Any]], x: str, y: str, kind: type[int] | type[float] = float
) -> list[list[tuple[float, float]]]:
    """Two columns as points, a list for each layer, in the order of the rows."""
    layers: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        layers.setdefault(row["layer"], []).append((kind(row[x]), float(row[y])))
    return list(layers.values())


def _decay_lines(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    layers = _by_layer(rows, "time", "norm")
    drawn = [points for points in layers if min(norm for _, norm in points) > 0]
    for points in drawn:
        axes.semilogy(*zip(*points, strict=True), color="tab:blue", alpha=0.4)
    if drawn:
        top = max(points[0][1] for points in drawn)
        times = [time for time, _ in drawn[0]]
        law = [top * math.exp(-2 * math.pi**2 * time) for time in times]
        axes.semilogy(times, law, "--", color="black", label="slope $-2\\pi^2$")
        axes.legend(frameon=False)
    axes.set_xlabel("flow time (linear flow)")
    axes.set_ylabel("metric off its diagonal")


def _layer_lines(axes: Axes, rows: Sequence[Mapping[str, Any]], column: str, label: str) -> None:
    for points in _by_layer(rows, "epoch", column, int):
        marker = "." if len(points) <= FEW_EPOCHS else ""
        axes.plot(*zip(*points, strict=True), marker=marker, color="tab:red", alpha=0.6)
    axes.set_ylabel(label)
    _epochs_below(axes)


def _epochs_below(axes: Axes) -> None:
    axes.set_xlabel("epoch")
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


def as_svg(figure: Figure, label: str) -> str:
    """A figure as an SVG element, in which black becomes the text colour of the page.

    Text is kept as text, so that it can be searched. The same figure gives the same element.

    Args:
        figure: the figure.
        label: what it shows, for screen readers; unique on the page.
    """
    content = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    text = content.getvalue()
    element = text[text.index("<svg") :].replace("#000000", "currentColor")
    # matplotlib numbers the groups of every figure alike; ids that are referred to have a salt.
    element = re.sub(r' id="\w+_\d+"', "", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
