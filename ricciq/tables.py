"""What the verbs show a person: plain values as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

_ABOUT = ("ricciq", "bits", "accuracy", "preprocessing")
"""What `inspect` shows of a file's metadata; --json has all of it."""


def plan_table(values: dict[str, Any]) -> Table:
    """What a run would do, and take."""
    title = f"{values['model']}: {values['steps']} steps on {values['device']}"
    about = (
        f"{values['bytes'] / 1e6:.1f} MB of {values['float_bytes'] / 1e6:.1f} MB in float; about "
        f"{values['training_memory'] / 1e9:.1f} GB to train, with batches of "
        f"{values['batch_size']}"
    )
    table = Table(title=shown(title), caption=about)
    for heading in ("layer", "weight bits", "activation bits", "weights", "bytes"):
        table.add_column(heading)
    for row in values["layers"]:
        names = ("name", "weight_bits", "act_bits", "parameters", "bytes")
        table.add_row(*(str(row[name]) for name in names))
    for kept in values["kept"]:
        table.add_row(kept["name"], "float", kept["why"], kept["kind"])
    return table


def sensitivity_table(rows: Sequence[Mapping[str, Any]], average: float) -> Table:
    """Which width each layer got, and what its answers lose in nats with it alone."""
    table = Table(title="bits a layer", caption=f"{average:.3f} bits a weight on average")
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
    """What an ONNX file holds."""
    layers = Table()
    headings = ("layer", "operator", "shape", "weight bits", "activation bits", "bytes", "integer")
    for heading in headings:
        layers.add_column(heading, overflow="fold")
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


def comparison_table(values: dict[str, Any]) -> Table:
    """A study: a row a method and learning rate."""
    bits = f"W{values['weight_bits']} A{values['act_bits']}"
    first = shown(values["results"][0]["method"])
    title = f"{values['model']} on {values['data']}, {bits}: {values['folder']}"
    table = Table(title=shown(title))
    table.add_column("method", overflow="fold", min_width=20)
    headings = (
        "rate x",
        "top-1, %",
        f"minus {first}, 95 %",
        "train loss",
        "drop",
        "diverged",
    )
    for heading in headings:
        table.add_column(heading, no_wrap=True)
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
    """Text out of a file, as a table shows it."""
    return escape(printable(text))


def printable(text: str) -> str:
    """Text with what could steer the terminal taken out."""
    return "".join(c if c.isprintable() else "?" for c in text)


def shortened(text: str, most: int = 900) -> str:
    """A sentence that names something long, without its middle: it ends with the remedy."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end]} … {text[-end:]}"
