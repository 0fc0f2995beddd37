"""Line charts as SVG elements for the page of a run.

They are written by hand, since importing matplotlib and drawing with it takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

COSINE = "cosine of gradient and corrected gradient"
BLUE, RED = "#1f77b4", "#d62728"
"""Visible on white and on black."""
WIDTH, HEIGHT = 400, 280
"""In pixels; a phone shows about as many, so that its text has the usual size."""
CHARACTER = 6.6
"""Average width of a character, in pixels."""
FEW_POINTS = 30
"""Most points of a line to mark; more markers would add megabytes to a page."""

Row = Mapping[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        points: (x, y) in the order of drawing.
        color: as SVG writes it; currentColor is that of the page's text.
        label: text in the legend; without it the line is faint and has no entry.
        dashed: whether it is dashed and has no markers.
    """

    points: Points
    color: str
    label: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class _Axis:
    """The range of an axis; logarithmic ones have it in powers of ten."""

    low: float
    high: float
    is_log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], is_log: bool = False) -> _Axis:
        """An axis with a margin around all values.

        It spans at least a hundredth of them, so that labels of four digits differ: cosines of
        nearly 1 are a level line.
        """
        scaled = [math.log10(value) if is_log else value for value in values]
        low, high = min(scaled, default=0.0), max(scaled, default=1.0)
        span = high - low
        least = math.log10(1.01) if is_log else max(abs(low), abs(high)) / 100
        margin = max(0.05 * span, (least - span) / 2) or 0.5  # all are 0
        return cls(low - margin, high + margin, is_log)

    def share(self, value: float) -> float:
        """The position of a value, from 0 at the low end to 1 at the high end."""
        scaled = math.log10(value) if self.is_log else value
        return (scaled - self.low) / (self.high - self.low)

    def ticks(self, whole: bool = False) -> list[float]:
        """Some round values; only whole numbers if so asked."""
        if not self.is_log:
            return _round_values(self.low, self.high, whole)
        if self.high - self.low < 1.5:  # too few powers of ten
            return _round_values(10**self.low, 10**self.high)
        return [10**power for power in _round_values(self.low, self.high, whole=True)]


def _round_values(low: float, high: float, whole: bool = False) -> list[float]:
    """At most seven multiples of 1, 2 or 5 times a power of ten."""
    least = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    if whole:
        step = max(step, 1.0)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def line_chart(
    lines: Sequence[Line], x_label: str, y_label: str, title: str, *, is_log: bool = False
) -> str:
    """Draw lines as an SVG element; text and axes have the colour of the page's text.

    Args:
        lines: what to draw; points that are not finite are left out.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        title: what the chart shows, for screen readers.
        is_log: whether the vertical axis is logarithmic; then all values must be positive.

    Returns:
        The element.
    """
    drawn = [[p for p in line.points if all(map(math.isfinite, p))] for line in lines]
    x_axis = _Axis.around(x for points in drawn for x, _ in points)
    y_axis = _Axis.around((y for points in drawn for _, y in points), is_log)
    whole = all(float(x).is_integer() for points in drawn for x, _ in points)
    y_ticks = [(tick, f"{tick:.4g}") for tick in y_axis.ticks()]
    labels = [line for line in lines if line.label]
    left = 26 + CHARACTER * max([3, *(len(text) for _, text in y_ticks)])
    top, right, bottom = 24 if labels else 10, WIDTH - 8, HEIGHT - 40

    def across(x: float) -> float:
        return left + x_axis.share(x) * (right - left)

    def down(y: float) -> float:
        return bottom - y_axis.share(y) * (bottom - top)

    middle = (top + bottom) / 2
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
        ' font-size="12" fill="currentColor">',
        f'<path d="M{left:.1f} {top}V{bottom}H{right}" fill="none" stroke="currentColor"/>',
        _text((left + right) / 2, HEIGHT - 6, "middle", x_label),
        _text(12, middle, "middle", y_label, f' transform="rotate(-90 12 {middle:.1f})"'),
    ]
    for tick in x_axis.ticks(whole):
        x = across(tick)
        parts.append(f'<path d="M{x:.1f} {bottom}v4" stroke="currentColor"/>')
        parts.append(_text(x, bottom + 17, "middle", f"{tick:.4g}"))
    for tick, text in y_ticks:
        y = down(tick)
        parts.append(f'<path d="M{left:.1f} {y:.1f}h-4" stroke="currentColor"/>')
        parts.append(_text(left - 7, y + 4, "end", text))
    for line, points in zip(lines, drawn, strict=True):
        parts.append(_line(line, [(across(x), down(y)) for x, y in points]))
    start = left + 8
    for line in labels:
        parts.append(f'<path d="M{start:.1f} 10h18" {_stroke(line)}/>')
        parts.append(_text(start + 23, 14, "start", line.label))
        start += 40 + CHARACTER * len(line.label)
    return "".join([*parts, "</svg>"])


def _text(x: float, y: float, anchor: str, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _stroke(line: Line) -> str:
    dashes = ' stroke-dasharray="6 4"' if line.dashed else ""
    return f'fill="none" stroke="{line.color}" stroke-width="1.5"{dashes}'


def _line(line: Line, points: Points) -> str:
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline points="{corners}" {_stroke(line)}/>']
    if len(points) <= FEW_POINTS and not line.dashed:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in points]
    opacity = 1 if line.label else 0.5
    return f'<g fill="{line.color}" opacity="{opacity}">{"".join(parts)}</g>'


def by_layer(
    rows: Sequence[Row], x: str, y: str, kind: type[int] | type[float] = float
) -> list[Points]:
    """Two columns of a table as points, a list for each layer, in the order of the rows.

    Args:
        rows: with a column ``layer``.
        x: the first column.
        y: the second column.
        kind: type of the first column's values.
    """
    layers: dict[str, Points] = {}
    for row in rows:
        layers.setdefault(row["layer"], []).append((kind(row[x]), float(row[y])))
    return list(layers.values())


def decay_lines(rows: Sequence[Row]) -> tuple[list[Points], Points]:
    """The perturbation of each layer over the flow time, and the decay of the linear flow.

    Args:
        rows: of decay.csv.

    Returns:
        The points of each layer whose norms are all positive, and those of the law exp(-2 π² t)
        from the largest norm; none if there is no such layer.
    """
    layers = [points for points in by_layer(rows, "time", "norm") if min(n for _, n in points) > 0]
    if not layers:
        return [], []
    largest = max(points[0][1] for points in layers)
    law = [(time, largest * math.exp(-2 * math.pi**2 * time)) for time, _ in layers[0]]
    return layers, law
