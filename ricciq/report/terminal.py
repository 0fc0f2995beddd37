"""Results of commands as tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import StringIO
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

_ABOUT = ("ricciq", "bits", "accuracy", "preprocessing", "input")
"""Keys of a file's metadata that `inspect` shows; --json prints all of them."""
LEAST_FOLDED = 12
"""Smallest width of a folded column, in characters."""


def show(
    values: dict[str, Any],
    as_json: bool,
    table: Callable[[dict[str, Any]], RenderableType] | None = None,
    quiet: bool = False,
) -> None:
    """Print the result of a command on stdout, as one JSON object or as a table.

    Args:
        values: the result.
        as_json: print JSON.
        table: makes a table of the result; `value_table` by default.
        quiet: print no table.
    """
    if as_json:
        print(json.dumps(values))
    elif not quiet:
        Console().print((table or value_table)(values))


class FittingTable(Table):
    """A table that never cuts a value; if the terminal is too narrow, each value gets a line.

    A column that may wrap also breaks words, but is at least `LEAST_FOLDED` characters wide.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """Render the table."""
        frame = 3 * len(self.columns) + 1
        if frame + sum(_least_width(c, console) for c in self.columns) <= options.max_width:
            for column in self.columns:
                column.overflow = "fold"
            yield from super().__rich_console__(console, options)
            return
        lines = Table(title=self.title, caption=self.caption, show_header=False)
        lines.add_column()
        lines.add_column(overflow="fold")
        for row in zip(*(column.cells for column in self.columns), strict=True):
            for column, cell in zip(self.columns, row, strict=True):
                if cell:
                    lines.add_row(column.header, cell)
            lines.add_section()
        yield lines


def _least_width(column: Column, console: Console) -> int:
    """Smallest width of a column, in characters."""
    wide = console.options.update(width=10_000)
    sizes = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
    if column.no_wrap:
        return max(size.maximum for size in sizes)
    return min(LEAST_FOLDED, max(size.minimum for size in sizes))


def plan_table(values: dict[str, Any]) -> Table:
    """What a run would do, and what it needs."""
    title = f"{values['model']}: {values['steps']} steps on {values['device']}"
    about = (
        f"{values['bytes'] / 1e6:.1f} MB of {values['float_bytes'] / 1e6:.1f} MB in float; about "
        f"{values['training_memory'] / 1e9:.1f} GB to train, with batches of "
        f"{values['batch_size']}"
    )
    if "seconds" in values:
        about += f"; about {time_in_words(values['seconds'])}"
    table = FittingTable(title=shown(title), caption=about)
    for heading in ("layer", "weight bits", "activation bits", "weights", "bytes"):
        table.add_column(heading)
    for row in values["layers"]:
        names = ("name", "weight_bits", "act_bits", "parameters", "bytes")
        table.add_row(*(str(row[name]) for name in names))
    for kept in values["kept"]:
        table.add_row(kept["name"], "float", kept["why"], kept["kind"])
    return table


def time_in_words(seconds: Mapping[str, float]) -> str:
    """How long a run takes, and its parts.

    Args:
        seconds: from `ricciq.workflows.forecast.Forecast.to_dict`.
    """
    parts = [key for key in seconds if key not in ("step", "whole") and seconds[key]]
    each = (f"{part.replace('_', ' ')} {_duration(seconds[part])}" for part in parts)
    return f"{_duration(seconds['whole'])}: {', '.join(each)}"


def _duration(seconds: float) -> str:
    """A time in the units that people would use."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if hours < 72:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} days {hours % 24} h"


def sensitivity_table(rows: Sequence[Mapping[str, Any]], average: float) -> Table:
    """The bits of each layer, and the loss in nats if only this layer is quantized.

    Args:
        rows: of sensitivity.csv.
        average: bits of a weight, on average.
    """
    table = Table(title="bits by layer", caption=f"{average:.3f} bits per weight on average")
    widths = [key for key in rows[0] if key.startswith("nats_at_")]
    table.add_column("layer", overflow="fold")
    for heading in ("weights", "bits", *(f"at {key.removeprefix('nats_at_')}" for key in widths)):
        table.add_column(heading, justify="right")
    for row in rows:
        losses = (f"{row[key]:.2g}" for key in widths)
        table.add_row(shown(row["layer"]), str(row["parameters"]), str(row["bits"]), *losses)
    return table


def as_text(table: Table) -> str:
    """A table as lines for a log, as wide as it needs to be."""
    console = Console(file=StringIO(), width=120)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def inspection_tables(values: dict[str, Any]) -> Group:
    """The layers and the metadata of an ONNX file."""
    layers = FittingTable()
    headings = ("layer", "operator", "shape", "weight bits", "activation bits", "bytes", "integer")
    for heading in headings:
        layers.add_column(heading)
    for row in values["layers"]:
        layers.add_row(
            shown(row["name"]),
            row["operator"],
            "x".join(str(n) for n in row["shape"]),
            str(row["weight_bits"]),
            str(row["act_bits"]),
            str(row["bytes"]),
            "yes" if row["fused"] else "no",
        )
    stored = values["metadata"] or {"ricciq": "wrote no metadata into this file"}
    about = {key: stored[key] for key in _ABOUT if key in stored}
    if isinstance(names := stored.get("class_names"), list):
        about["classes"] = len(names)
    return Group(layers, value_table(values["totals"]), value_table(about))


def prediction_table(values: dict[str, Any]) -> Table:
    """The most likely classes of images, a row for each image."""
    table = FittingTable()
    table.add_column("image")
    most = max((len(row["classes"]) for row in values["images"]), default=0)
    for rank in range(1, most + 1):
        table.add_column(f"top {rank}")
    for row in values["images"]:
        cells = (f"{shown(c['class'])} {100 * c['probability']:.1f} %" for c in row["classes"])
        table.add_row(shown(row["image"]), *cells)
    return table


def recipes_table(values: dict[str, Any]) -> Table:
    """The shipped recipes."""
    table = FittingTable()
    table.add_column("name", no_wrap=True)
    for heading in ("model", "bits", "data", "epochs"):
        table.add_column(heading)
    for row in values["recipes"]:
        bits = f"W{row['weight_bits']} A{row['act_bits']}"
        table.add_row(row["name"], row["model"], bits, row["data"] or "-", str(row["epochs"]))
    return table


def keys_table(values: dict[str, Any]) -> Table:
    """The keys of a recipe."""
    table = FittingTable()
    table.add_column("key", no_wrap=True)
    for heading in ("type", "default", "description"):
        table.add_column(heading)
    for row in values["keys"]:
        default = "-" if row["default"] is None else json.dumps(row["default"])
        table.add_row(row["key"], row["type"], default, row["description"])
    return table


def doctor_tables(values: dict[str, Any]) -> Group:
    """Versions, the machine, and problems with their remedies."""
    problems = FittingTable(title="problems")
    problems.add_column("what")
    problems.add_column("remedy")
    for problem in values["problems"]:
        problems.add_row(shown(problem["what"]), shown(problem["remedy"]))
    machine = {key: values[key] for key in values if key not in ("versions", "problems")}
    last = problems if values["problems"] else Text("no problems found")
    return Group(value_table(values["versions"]), value_table(machine), last)


def comparison_table(values: dict[str, Any]) -> Table:
    """A study: a row for each method and learning rate."""
    bits = f"W{values['weight_bits']} A{values['act_bits']}"
    first = shown(values["results"][0]["method"])
    title = f"{values['model']} on {values['data']}, {bits}: {values['folder']}"
    table = FittingTable(title=shown(title))
    headings = (
        "method",
        "rate x",
        "top-1, %",
        f"minus {first}, 95 %",
        "train loss",
        "drop",
        "diverged",
    )
    for heading in headings:
        table.add_column(heading)
    for row in values["results"]:
        loss = row["train_loss"]
        table.add_row(
            shown(row["method"]),
            f"{row['lr_scale']:g}",
            f"{row['mean']:.2f} ± {row['std']:.2f}",
            shown(f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"),
            "" if loss is None else f"{loss:.4f}",
            f"{row['drop']:.2f}",
            f"{row['divergences']} of {row['seeds']}",
        )
    return table


def value_table(values: dict[str, Any]) -> Table:
    """Names and values."""
    table = Table(show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for key, value in values.items():
        table.add_row(key, shown(_text(value)))
    return table


def _text(value: Any, depth: int = 2) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if depth and isinstance(value, list):
        return ", ".join(_text(part, depth - 1) for part in value)
    if depth and isinstance(value, dict):
        return "; ".join(f"{key} {_text(part, depth - 1)}" for key, part in value.items())
    return str(value)


def shown(text: str) -> str:
    """Text from a file, escaped for a table."""
    return escape(printable(text))


def printable(text: str) -> str:
    """Text without characters that could control the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def shortened(text: str, most: int = 900) -> str:
    """A sentence cut in the middle, so that the remedy at its end is kept.

    Args:
        text: the sentence.
        most: largest number of characters to keep.
    """
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end]} … {text[-end:]}"
