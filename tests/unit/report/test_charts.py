"""Charts of the page: well-formed SVG with every point inside, round ticks, escaped texts."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from ricciq.report.charts import FEW_POINTS, HEIGHT, RED, WIDTH, Line, decay_lines, line_chart


def chart(*lines: Line, is_log: bool = False) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart(lines, "epoch", "loss", "a title", is_log=is_log))


def ticks(element: ElementTree.Element) -> list[float]:
    """The numbers at both axes, in order."""
    texts = [text.text or "" for text in element.iter("text")]
    return [float(text) for text in texts if re.fullmatch(r"[-+.e\d]+", text)]


def corners(element: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = [pair for line in element.iter("polyline") for pair in line.attrib["points"].split()]
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize(
    "values",
    [[1.0], [0.5, 0.5], [1e-9, 1e9], [97.5, 98.0, 98.5], [1e300, 1e300], [5e-324, 1.0], [1, 2, 3]],
    ids=str,
)
def test_every_point_is_inside_and_every_axis_has_ticks(values: list[float], is_log: bool) -> None:
    element = chart(Line(list(enumerate(values, 1)), RED), is_log=is_log)
    found = corners(element)
    assert len(found) == len(values)
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in found)
    assert len(ticks(element)) > 1


def test_ticks_are_round_and_those_of_epochs_are_whole() -> None:
    element = chart(Line([(1, 0.21), (2, 0.43), (3, 0.39)], RED))
    assert ticks(element) == [1, 2, 3, 0.2, 0.25, 0.3, 0.35, 0.4]


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("values", [[1.0, 1 - 1e-16], [0.99999, 1.0], [1e5, 1e5 + 1], [7.0, 7.1]])
def test_labels_of_values_that_hardly_differ_are_different(
    values: list[float], is_log: bool
) -> None:
    found = ticks(chart(Line(list(enumerate(values, 30)), RED), is_log=is_log))
    assert found[:2] == [30, 31]
    assert len(found) == len(set(found)) > 3


def test_a_logarithmic_axis_has_powers_of_ten_unless_there_are_too_few() -> None:
    points = [(0.0, 1e-4), (0.5, 1.0)]
    assert ticks(chart(Line(points, RED), is_log=True))[-5:] == [1e-4, 1e-3, 1e-2, 1e-1, 1]
    assert ticks(chart(Line([(0, 2.0), (1, 9.0)], RED), is_log=True))[-4:] == [2, 4, 6, 8]


def test_points_that_are_not_finite_are_left_out() -> None:
    points = [(1.0, 0.5), (2.0, math.nan), (3.0, math.inf), (4.0, 0.7)]
    assert len(corners(chart(Line(points, RED)))) == 2
    assert corners(chart(Line([], RED))) == []


def test_extreme_numbers_are_an_arithmetic_error() -> None:
    with pytest.raises(ArithmeticError):
        chart(Line([(0, -1e308), (1, 1e308)], RED))


def test_only_lines_of_few_points_have_markers() -> None:
    for count, markers in ((FEW_POINTS, FEW_POINTS), (FEW_POINTS + 1, 0)):
        element = chart(Line([(n, n) for n in range(count)], RED))
        assert len(list(element.iter("circle"))) == markers


def test_texts_are_escaped_and_labels_are_the_legend() -> None:
    svg = line_chart([Line([(0, 1)], RED, '<b> & "c"')], "x < y", "&", '"><script>')
    element = ElementTree.fromstring(svg)
    assert {text.text for text in element.iter("text")} >= {'<b> & "c"', "x < y", "&"}
    assert element.attrib["aria-label"] == '"><script>'


def test_the_law_of_the_decay_begins_at_the_largest_norm() -> None:
    rows = [
        {"layer": layer, "time": str(time), "norm": str(norm)}
        for layer, norms in {"a": (1.0, 0.5), "b": (2.0, 0.1), "c": (0.0, 0.0)}.items()
        for time, norm in zip((0.0, 0.1), norms, strict=True)
    ]
    layers, law = decay_lines(rows)
    assert layers == [[(0.0, 1.0), (0.1, 0.5)], [(0.0, 2.0), (0.1, 0.1)]]
    assert law == [(0.0, 2.0), (0.1, pytest.approx(2 * math.exp(-0.2 * math.pi**2)))]
    assert decay_lines([]) == ([], [])
