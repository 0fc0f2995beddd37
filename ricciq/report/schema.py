"""The report of a run: its JSON, and its table for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.markup import escape

from ricciq.errors import InputError, on_one_line
from ricciq.report.speed import why_slower
from ricciq.report.terminal import FittingTable
from ricciq.system.files import write_atomically


class _Part(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class Accuracy(_Part):
    """Accuracy in percent, cross-entropy in nats."""

    model_config = ConfigDict(allow_inf_nan=False)

    top1: float
    top5: float
    loss: float
    samples: int | None = None


class OnnxAccuracy(Accuracy):
    """Accuracy of the ONNX file, and its agreement with the torch model it was exported from.

    Agreement is the percentage of samples with the same most likely class: ``agreement`` with
    onnxruntime's default optimizations, ``agreement_unoptimized`` with all of them off, and
    ``float_agreement`` with the float model; None if the run itself was in float. ``float_from`` is
    the first layer whose input is computed in float; up to there, torch and file have the same
    codes. None: everywhere.
    """

    agreement: float
    max_abs_diff: float
    agreement_unoptimized: float
    top1_unoptimized: float
    path: str
    float_agreement: float | None = None
    float_from: str | None = None


class Size(_Part):
    """Size of the two ONNX files, in bytes."""

    float_bytes: int
    onnx_bytes: int
    ratio: float = Field(gt=0)


class LatencyReport(_Part):
    """Median milliseconds for a batch, from interleaved measurements.

    ``integer_instructions`` says whether the CPU has instructions for integer dot products (VNNI);
    None if that is not known.
    """

    float_ms: float
    onnx_ms: float
    speedup: float = Field(gt=0)
    threads: int
    batch: int
    integer_instructions: bool | None = None


class LayerReport(_Part):
    """A discrete layer.

    ``channels`` are its outputs. These and ``depthwise`` are None in reports of older versions.
    """

    name: str
    kind: str
    weight_bits: int | str
    act_bits: int
    parameters: int
    bytes: int
    fused: bool
    channels: int | None = None
    depthwise: bool | None = None


class KeptReport(_Part):
    """A part that is kept in float, and why."""

    name: str
    kind: str
    why: str


class GeometryReport(_Part):
    """Means over the layers at the last step of the last epoch; None without training.

    If the flow is not ``applied``, it is a probe: it shows what the flow of rows of weights would
    do. None is a report of a version without this key.
    """

    perturbation_start: float | None = None
    perturbation_end: float | None = None
    decay: float | None = None
    mismatch_cosine: float | None = None
    applied: bool | None = None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if len({value is None for name, value in self if name != "applied"}) > 1:
            raise ValueError("some of the numbers of the geometry are missing")
        return self


class TrainingReport(_Part):
    """Cost of training."""

    epochs: int
    steps: int
    seconds: float
    device: str
    images_per_second: float
    skipped_steps: int
    holdout_top1: float | None
    chosen_epoch: int


class FloatTrainingReport(_Part):
    """How the float model was trained before it was quantized."""

    head_epochs: int
    epochs: int
    holdout_top1: float


class Report(_Part):
    """All results of a run; schema 1, to which keys are only added.

    If images are not ``labelled``, accuracies are agreement with the float model. ``operators`` are
    those that onnxruntime runs for the file, with the count of each.
    """

    model_config = ConfigDict(populate_by_name=True, protected_namespaces=())

    schema_version: int = Field(default=1, alias="schema")
    ricciq: str
    model: str
    data: str
    method: str
    weight_bits: int | str
    act_bits: int
    seed: int
    float_: Accuracy = Field(alias="float")
    quantized: Accuracy
    onnx: OnnxAccuracy
    size: Size
    latency: LatencyReport
    layers: list[LayerReport]
    kept: list[KeptReport]
    geometry: GeometryReport
    training: TrainingReport
    float_training: FloatTrainingReport | None = None
    labelled: bool = True
    messages: list[str] = []
    operators: dict[str, int] = {}

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the keys of report.json."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: Path) -> None:
        """Write report.json, after all other files: its presence marks the run as finished."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def to_table(self) -> FittingTable:
        """The main results as a table for the terminal; its footnote says why a file is slow."""
        bits = f"W{self.weight_bits} A{self.act_bits}"
        causes = [f"- {cause.why} {cause.remedy}" for cause in why_slower(self)]
        table = FittingTable(
            title=escape(f"{self.model} on {self.data}, {bits}, {self.method}"),
            caption=escape("\n".join(["Slower than float:", *causes])) if causes else None,
            caption_justify="left",
        )
        table.add_column("")
        for heading in ("float", "quantized", "ONNX", "difference"):
            table.add_column(heading, justify="right")
        table.add_row(
            "top-1" if self.labelled else "agreement with float",
            f"{self.float_.top1:.2f} %",
            f"{self.quantized.top1:.2f} %",
            f"{self.onnx.top1:.2f} %",
            f"{self.onnx.top1 - self.float_.top1:+.2f}",
        )
        table.add_row(
            "top-5" if self.labelled else "float class in top 5",
            f"{self.float_.top5:.2f} %",
            f"{self.quantized.top5:.2f} %",
            f"{self.onnx.top5:.2f} %",
            f"{self.onnx.top5 - self.float_.top5:+.2f}",
        )
        table.add_row(
            "size",
            f"{self.size.float_bytes / 1e6:.3f} MB",
            "",
            f"{self.size.onnx_bytes / 1e6:.3f} MB",
            f"size x {self.size.ratio:.3f}",
        )
        table.add_row(
            "latency",
            f"{self.latency.float_ms:.2f} ms",
            "",
            f"{self.latency.onnx_ms:.2f} ms",
            f"speed x {self.latency.speedup:.2f}",
        )
        table.add_row("agreement", "", "", f"{self.onnx.agreement:.2f} %", "")
        return table


def load_report(path: Path) -> Report:
    """Read a report.json.

    Raises:
        InputError: it is missing, or not a report that ricciq wrote.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = on_one_line(error, 160)
        raise InputError(
            f"{path} is not the report of a run ({reason}); give a finished run"
        ) from None
