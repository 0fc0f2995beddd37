"""Why a file is slower than float: a cause is named if the figures show it, and only then."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ricciq.report.page import to_html, to_markdown
from ricciq.report.schema import Report
from ricciq.report.speed import why_slower
from ricciq.runs.folder import RunFolder

LAYER = {
    "name": "layer1.0.conv1",
    "kind": "QuantConv2d",
    "weight_bits": 2,
    "act_bits": 2,
    "parameters": 150_000,
    "bytes": 40_000,
    "fused": True,
    "channels": 128,
    "depthwise": False,
}
ACCURACY = {"top1": 97.2, "top5": 99.9, "loss": 0.12, "samples": 360}
SLOW = {
    "ricciq": "0.1.0",
    "model": "some_net",
    "data": "digits",
    "method": "ricci",
    "weight_bits": 2,
    "act_bits": 2,
    "seed": 0,
    "float": ACCURACY,
    "quantized": ACCURACY,
    "onnx": {
        **ACCURACY,
        "agreement": 100.0,
        "max_abs_diff": 0.1,
        "agreement_unoptimized": 100.0,
        "top1_unoptimized": 97.2,
        "path": "model.onnx",
    },
    "size": {"float_bytes": 1000, "onnx_bytes": 100, "ratio": 0.1},
    "latency": {
        "float_ms": 2.0,
        "onnx_ms": 2.5,
        "speedup": 0.8,
        "threads": 1,
        "batch": 1,
        "integer_instructions": True,
    },
    "layers": [LAYER] * 4,
    "kept": [],
    "geometry": {},
    "training": {
        "epochs": 0,
        "steps": 0,
        "seconds": 0.0,
        "device": "cpu",
        "images_per_second": 0.0,
        "skipped_steps": 0,
        "holdout_top1": None,
        "chosen_epoch": 0,
    },
    "operators": {"QLinearConv": 4, "Clip": 4, "QLinearAdd": 2},
}
"""Slow, with figures that show no cause."""
KEPT = {"name": "norm", "kind": "LayerNorm", "why": "no integer kernel"}
CAUSES = {
    "float layers": ({"layers.0.fused": False}, "1 of 4 layers run in float", "inspect"),
    "float activations": (
        {"layers.0.fused": False, "layers.0.act_bits": 32},
        "their activations are float",
        "--act-bits 8",
    ),
    "float parts": ({"kept": [KEPT] * 3}, "Float parts (3 in this", "Kept in float"),
    "few weights": (
        {"layers": [{**LAYER, "parameters": 7_500}] * 4},
        "small (30,000 weights, 2.00 ms in float): the fixed cost of the 6 operators",
        "wider",
    ),
    "short": ({"latency.float_ms": 0.03}, "0.03 ms in float", "larger batches"),
    "narrow": ({"layers.1.channels": 16}, "1 of 4 layers have at most 32 channels", "wider"),
    "depthwise": ({"layers.2.depthwise": True}, "1 of 4 layers are depthwise", "full"),
    "no VNNI": ({"latency.integer_instructions": False}, "(VNNI)", "ricciq bench"),
}


def report_with(changes: dict[str, Any]) -> Report:
    """The slow report with other values, each under a path of keys."""
    values = json.loads(json.dumps(SLOW))
    for path, value in changes.items():
        *above, last = path.split(".")
        place = values
        for key in above:
            place = place[int(key) if isinstance(place, list) else key]
        place[last] = value
    return Report.model_validate(values)


@pytest.mark.parametrize("cause", CAUSES)
def test_the_figure_that_shows_a_cause_names_it_alone(cause: str) -> None:
    changes, why, remedy = CAUSES[cause]
    (found,) = why_slower(report_with(changes))
    assert why in found.why
    assert remedy in found.remedy


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("other", [{"latency.speedup": 1.0}, {"layers": []}], ids=str)
def test_a_file_that_is_not_slower_or_is_float_needs_no_cause(
    cause: str, other: dict[str, Any]
) -> None:
    assert not why_slower(report_with(CAUSES[cause][0] | other))


@pytest.mark.parametrize("key", ["channels", "depthwise"])
def test_without_a_known_cause_it_is_said_that_there_is_none(key: str) -> None:
    few = [{**LAYER, key: 16 if key == "channels" else True}, *[LAYER] * 7]  # too few to matter
    for changes in ({}, {"layers": few}):
        (found,) = why_slower(report_with(changes))
        assert "no known cause" in found.why
        assert "ricciq bench" in found.remedy


def test_a_report_of_a_version_without_the_new_keys_blames_nothing_on_them() -> None:
    values: dict[str, Any] = {**SLOW}
    values["layers"] = [{k: v for k, v in LAYER.items() if k not in ("channels", "depthwise")}]
    values["latency"] = {**values["latency"], "float_ms": 0.05}
    del values["latency"]["integer_instructions"]
    del values["operators"]
    (found,) = why_slower(Report.model_validate(values))
    assert "the fixed cost of each operator" in found.why


def shown(report: Report, width: int) -> str:
    console = Console(file=StringIO(), width=width)
    with console.capture() as captured:
        console.print(report.to_table())
    return " ".join(captured.get().split())


@pytest.mark.parametrize("width", [100, 30], ids=["a table", "lines"])
def test_the_terminal_and_the_pages_say_why_and_what_to_do(tmp_path: Path, width: int) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    slow = report_with(CAUSES["few weights"][0] | CAUSES["no VNNI"][0])
    fast = report_with({"latency.speedup": 2.0})
    for make in (
        lambda report: shown(report, width),
        to_markdown,
        lambda report: to_html(RunFolder(tmp_path), report),
    ):
        for cause in why_slower(slow):
            assert f"{cause.why} {cause.remedy}" in make(slow)
        assert "lower than float" not in make(fast)
