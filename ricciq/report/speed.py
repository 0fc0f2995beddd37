"""Why a file is slower than its float model, as far as a report's figures show, and remedies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ricciq.deploy.inspection import INTEGER

if TYPE_CHECKING:
    from ricciq.report.schema import LayerReport, Report

SMALL = 100_000
"""Weights of a small network."""
SHORT = 0.1
"""Milliseconds of a short call of the float model: some 30 operators take as long without data."""
NARROW = 32
"""Channels up to which an integer convolution takes about as long as a float one."""
MANY = 0.25
"""Share of the layers from which narrow and depthwise ones count as a cause."""


class Cause(NamedTuple):
    """A cause of a slow file; both are sentences.

    Attributes:
        why: the cause, with the figures that show it.
        remedy: what to do about it.
    """

    why: str
    remedy: str


def why_slower(report: Report) -> list[Cause]:
    """Why the file of a run is slower than its float model.

    Args:
        report: of the run.

    Returns:
        The causes that the report's figures show; none if the file is not slower, or is float.
    """
    if report.latency.speedup >= 1 or not report.layers:
        return []
    found = [*_float_parts(report), *_size(report), *_shapes(report.layers), *_cpu(report)]
    if found:
        return found
    why = "The figures show no known cause; other load on the machine can be one."
    return [Cause(why, "Measure again with `ricciq bench model.onnx --against float.onnx`.")]


def _float_parts(report: Report) -> Iterator[Cause]:
    """Layers and other parts that no integer kernel runs."""
    unfused = [layer for layer in report.layers if not layer.fused]
    if unfused:
        of_layers = f"{len(unfused)} of {len(report.layers)} layers run in float kernels"
        if all(layer.act_bits > 8 for layer in unfused):
            why, remedy = "because their activations are float", "Give --act-bits 8 or fewer."
        else:
            why, remedy = f"such as {unfused[0].name}", "`ricciq inspect model.onnx` lists them."
        yield Cause(f"{of_layers}, {why}.", remedy)
    if report.kept:
        yield Cause(
            f"Float parts ({len(report.kept)} in this network) need conversions from and to "
            "integers.",
            "report.md says under Kept in float why each of them is; a network without such parts "
            "is faster.",
        )


def _size(report: Report) -> Iterator[Cause]:
    """The fixed cost of operators, which a small network does not make up for."""
    weights = sum(layer.parameters for layer in report.layers)
    if weights >= SMALL and report.latency.float_ms >= SHORT:
        return
    between = sum(n for name, n in report.operators.items() if name not in INTEGER)
    cost = f"the {between} operators between its kernels" if between else "each operator"
    yield Cause(
        f"The network is small ({weights:,} weights, {report.latency.float_ms:.2f} ms in float): "
        f"the fixed cost of {cost} exceeds what integer kernels save.",
        "Take a wider network, or larger batches, as in `ricciq bench model.onnx --batch 16`.",
    )


def _shapes(layers: list[LayerReport]) -> Iterator[Cause]:
    """Layers that compute little with each number they read."""
    depthwise = [layer for layer in layers if layer.depthwise]
    narrow = [x for x in layers if x.channels and x.channels <= NARROW and x not in depthwise]
    if len(depthwise) >= MANY * len(layers):
        yield Cause(
            f"{len(depthwise)} of {len(layers)} layers are depthwise convolutions, which gain "
            "little from integers.",
            "Take a network of full convolutions.",
        )
    if len(narrow) >= MANY * len(layers):
        yield Cause(
            f"{len(narrow)} of {len(layers)} layers have at most {NARROW} channels, too few to "
            "gain from integers.",
            "Take a wider network.",
        )


def _cpu(report: Report) -> Iterator[Cause]:
    if report.latency.integer_instructions is False:
        yield Cause(
            "The CPU of the run has no instructions for integer dot products (VNNI).",
            "Run `ricciq bench model.onnx --against float.onnx` on the machine that will run it.",
        )
