"""The pages of a run: report.md, and report.html, which needs no other file and no network."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from ricciq.errors import InputError
from ricciq.report.charts import BLUE, COSINE, RED, Line, by_layer, decay_lines, line_chart
from ricciq.report.disagreements import THUMBNAIL, Disagreements
from ricciq.report.schema import Report, load_report
from ricciq.report.speed import why_slower
from ricciq.runs.folder import RunFolder
from ricciq.system.files import write_atomically
from ricciq.system.tables import read_csv

_TERNARY_BITS = math.log2(3)


class Drawing(NamedTuple):
    """A figure of the page.

    Attributes:
        svg: the SVG element.
        caption: what it shows.
    """

    svg: Markup
    caption: str


def render_run(path: Path, *, dry_run: bool = False) -> list[Path]:
    """Write the pages of a finished run again.

    Args:
        path: the run's folder.
        dry_run: make the pages, but write nothing.

    Returns:
        The paths of the pages.

    Raises:
        InputError: the folder is not that of a finished run, or a file in it is damaged.
        UsageError: another process uses the folder.
    """
    folder = RunFolder(path)
    report = load_report(folder.report)
    if dry_run:
        to_html(folder, report)
    else:
        with folder.locked():
            write_pages(folder, report)
    return [folder.report_markdown, folder.page]


def write_pages(folder: RunFolder, report: Report) -> None:
    """Write report.md and report.html of a run.

    Args:
        folder: of the run.
        report: of the run.

    Raises:
        InputError: another file of the run is damaged.
    """
    page = to_html(folder, report)  # first, so that an error leaves both pages unchanged
    write_atomically(folder.report_markdown, to_markdown(report))
    write_atomically(folder.page, page)


def to_markdown(report: Report) -> str:
    """The report as a Markdown page."""
    facts = {"r": report, "float": report.float_, "causes": why_slower(report)}
    return _render("report.md.j2", **facts) + "\n"


def to_html(folder: RunFolder, report: Report) -> str:
    """The report as an HTML page, with plots and tables of the other files of the run.

    Args:
        folder: of the run.
        report: of the run.

    Raises:
        InputError: one of these files is damaged.
    """
    try:
        return _render(
            "report.html.j2",
            r=report,
            float=report.float_,
            causes=why_slower(report),
            training=_training_drawings(folder, report),
            geometry=_geometry_drawings(folder, report),
            sensitivity=[_sensitivity_row(row) for row in read_csv(folder.sensitivity)],
            disagreements=Disagreements.load(folder.disagreements),
            thumbnail=THUMBNAIL,
            most_bytes=max([1, *(layer.bytes for layer in report.layers)]),
            share_of_8=_share_of_8,
            recipe=folder.recipe.read_text(encoding="utf-8"),
            command=_command(folder, report),
        )
    # Extreme numbers raise an ArithmeticError in a chart.
    except (KeyError, ValueError, TypeError, ArithmeticError, OSError) as error:
        raise InputError(
            f"{folder.path} has tables that cannot be read ({error}); give a finished run as "
            "ricciq wrote it"
        ) from None


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html.j2"]),  # names come from files
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def _training_drawings(folder: RunFolder, report: Report) -> list[Drawing]:
    rows = read_csv(folder.summary)
    if not rows:
        return []
    top1 = "top-1" if report.labelled else "agreement with float"
    return [
        _drawing(_train_and_holdout(rows, "loss"), "epoch", "loss", "Loss over the epochs"),
        _drawing(
            _train_and_holdout(rows, "top1"), "epoch", f"{top1}, %", f"{top1} over the epochs"
        ),
    ]


def _train_and_holdout(rows: list[dict[str, Any]], metric: str) -> list[Line]:
    epochs = [int(row["epoch"]) for row in rows]
    return [
        Line(list(zip(epochs, (float(row[column]) for row in rows), strict=True)), color, label)
        for column, color, label in (
            (f"train_{metric}", BLUE, "train"),
            (f"holdout_{metric}", RED, "hold-out"),
        )
    ]


def _geometry_drawings(folder: RunFolder, report: Report) -> list[Drawing]:
    drawings = []
    if decay := read_csv(folder.decay):
        caption = "Perturbation of the LNE metric over the time of the linear flow, by layer"
        if report.geometry.applied is False:
            caption += "; computed as a probe, not applied in training"
        layers, law = decay_lines(decay)
        lines = [Line(points, BLUE) for points in layers]
        lines += [Line(law, "currentColor", "slope −2π²", dashed=True)] if law else []
        axes = "flow time (linear flow)", "metric off its diagonal"
        drawings.append(_drawing(lines, *axes, caption, is_log=True))
    if rows := read_csv(folder.geometry):
        for column, label, caption in (
            ("mismatch_cosine", "cosine", COSINE.capitalize()),
            ("codes_changed", "share", "Oscillation: share of codes that changed"),
        ):
            lines = [Line(points, RED) for points in by_layer(rows, "epoch", column, int)]
            drawings.append(_drawing(lines, "epoch", label, f"{caption}, by layer"))
    return drawings


def _drawing(
    lines: list[Line], x_label: str, y_label: str, caption: str, *, is_log: bool = False
) -> Drawing:
    svg = line_chart(lines, x_label, y_label, caption, is_log=is_log)
    return Drawing(Markup(svg), caption)  # line_chart escapes its texts


def _sensitivity_row(row: dict[str, Any]) -> dict[str, Any]:
    """A layer's losses in nats by bits, and the bits it got."""
    widths = {k.removeprefix("nats_at_"): float(row[k]) for k in row if k.startswith("nats_at_")}
    return {"layer": row["layer"], "bits": row["bits"], "nats": widths}


def _share_of_8(bits: int | str) -> float:
    """Length of the bar for a number of bits, percent of that of 8; zero for float."""
    number = _TERNARY_BITS if isinstance(bits, str) else bits
    return 100 * number / 8 if number <= 8 else 0.0


def _command(folder: RunFolder, report: Report) -> str:
    """The command that repeats the run."""
    recipe = shlex.quote(str(folder.recipe))
    return f"ricciq quantize {shlex.quote(report.model)} --recipe {recipe} --output runs/again"
