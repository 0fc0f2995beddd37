"""The main job on real pictures, as a user starts it, and what it leaves behind."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from command import MAIN_JOB
from command import json_of as ricciq
from fashion import lay_out_fashion_mnist, needs_fashion
from kernels import kernels_are_known
from processes import start
from safetensors.torch import load_file, save_file

from ricciq.deploy.inspection import inspect_onnx

pytestmark = pytest.mark.slow

FILES = {
    "recipe.yaml",
    "summary.csv",
    "geometry.csv",
    "geometry.png",
    "layers.csv",
    "last.safetensors",
    "best.safetensors",
    "state.json",
    "model.onnx",
    "float.onnx",
    "report.json",
    "report.md",
    "report.html",
    "disagreements.json",
    "decay.csv",
    "log.txt",
}
SHORT = [*MAIN_JOB, "--epochs", "2"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def run(run_once: Callable[..., Path]) -> tuple[Path, dict[str, Any]]:
    """The README's main job, and what it printed."""
    folder = run_once("main job", *MAIN_JOB)
    return folder, json.loads((folder.parent / "printed.json").read_text())


def test_the_main_job_keeps_the_accuracy(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    assert report["float"]["top1"] >= 97.5
    assert report["onnx"]["top1"] >= report["float"]["top1"] - 1.0
    assert report["float"]["samples"] == 360


def test_the_file_agrees_with_torch(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    onnx = report["onnx"]
    assert onnx["agreement"] >= 99.5
    assert onnx["agreement_unoptimized"] >= 99.5
    if kernels_are_known():
        assert onnx["agreement"] == 100.0
        assert onnx["top1"] == report["quantized"]["top1"]


def test_a_run_leaves_everything_and_nothing_half_written(
    run: tuple[Path, dict[str, Any]],
) -> None:
    folder, report = run
    present = {path.name for path in folder.iterdir()}
    assert present >= FILES
    assert not [name for name in present if name.endswith(".tmp")]
    stored = json.loads((folder / "report.json").read_text())
    assert stored == {key: value for key, value in report.items() if key != "run_folder"}
    assert len(rows(folder / "summary.csv")) == report["training"]["epochs"]
    layers = rows(folder / "layers.csv")
    assert [row["name"] for row in layers] == [layer["name"] for layer in report["layers"]]
    geometry = rows(folder / "geometry.csv")
    assert len(geometry) == report["training"]["epochs"] * len(layers)
    assert f"{report['onnx']['top1']:.2f}" in (folder / "report.md").read_text()


def test_every_convolution_runs_in_integers(run: tuple[Path, dict[str, Any]]) -> None:
    folder, report = run
    shown = ricciq("inspect", folder / "model.onnx")
    assert all(layer["fused"] for layer in shown["layers"])
    assert [layer["weight_bits"] for layer in shown["layers"]] == [8, *[2] * 8, 8]
    assert [layer["act_bits"] for layer in shown["layers"]] == [8, *[2] * 8, 8]
    assert shown["totals"]["file bytes"] == report["size"]["onnx_bytes"]


def test_eval_finds_what_the_report_says_for_every_kind_of_target(
    run: tuple[Path, dict[str, Any]],
) -> None:
    folder, report = run
    kinds = {folder / "model.onnx": "onnx", folder: "quantized"}
    kinds[folder / "best.safetensors"] = "quantized"
    for target, kind in kinds.items():
        found = ricciq("eval", target, "--data", "digits", "--reference", folder / "model.onnx")
        assert found["top1"] == report[kind]["top1"]
        assert found["agreement"] >= 99.5
        assert found["latency_ms"] > 0


def test_gates(run: tuple[Path, dict[str, Any]]) -> None:
    folder, report = run
    target, top1 = folder / "model.onnx", report["onnx"]["top1"]
    ricciq("eval", target, "--data", "digits", "--min-top1", str(top1 - 0.01))
    failed = ricciq("eval", target, "--data", "digits", "--min-top1", str(top1 + 0.01), expect=4)
    assert failed["top1"] == top1
    for reference in (folder, folder / "float.onnx"):
        gate = ["--reference", reference, "--min-agreement", "100.1"]
        ricciq("eval", target, "--data", "digits", *gate, expect=4)


def test_the_float_file_has_the_float_accuracy(run: tuple[Path, dict[str, Any]]) -> None:
    folder, report = run
    found = ricciq("eval", folder / "float.onnx", "--data", "digits")
    assert found["top1"] == report["float"]["top1"]


def test_export_writes_the_same_file_again_and_a_float_one_that_agrees(
    run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = run
    again = ricciq("export", folder, "--output", tmp_path / "again.onnx")
    assert Path(again["path"]).read_bytes() == (folder / "model.onnx").read_bytes()
    ricciq("export", folder, "--output", tmp_path / "float.onnx", "--format", "float")
    operators = {node.op_type for node in onnx.load(tmp_path / "float.onnx").graph.node}
    assert not operators & {"QuantizeLinear", "DequantizeLinear", "Gather"}
    found = ricciq(
        "eval", tmp_path / "float.onnx", "--data", "digits", "--reference", folder / "model.onnx"
    )
    assert found["agreement"] >= 99.5


def test_bench_times_both_files(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    shown = ricciq("bench", folder / "model.onnx", "--against", folder / "float.onnx")
    assert shown["ratio"] == pytest.approx(shown["against_ms"] / shown["file_ms"])


def test_two_runs_with_one_seed_give_the_same_bytes(finished_run: Path, tmp_path: Path) -> None:
    process = start([*SHORT, "--output", tmp_path / "run"])  # with another order of sets
    _, err = process.communicate()
    assert process.returncode == 0, err
    for name in ("best.safetensors", "model.onnx", "float.onnx", "recipe.yaml"):
        assert (tmp_path / "run" / name).read_bytes() == (finished_run / name).read_bytes(), name


def test_a_stopped_run_resumes_to_the_same_weights_and_file(
    finished_run: Path, tmp_path: Path
) -> None:
    stopped = tmp_path / "stopped"
    process = start([*SHORT, "--output", stopped])
    while process.poll() is None and not (stopped / "state.json").is_file():
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "--resume" in err.strip().splitlines()[-1]
    assert not (stopped / "report.json").exists()
    report = ricciq(*SHORT, "--output", stopped, "--resume")
    assert report["training"]["epochs"] == 2
    for name in ("last", "best"):
        first = load_file(finished_run / f"{name}.safetensors")
        second = load_file(stopped / f"{name}.safetensors")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert (finished_run / "model.onnx").read_bytes() == (stopped / "model.onnx").read_bytes()
    epochs = [[row["epoch"] for row in rows(f / "summary.csv")] for f in (finished_run, stopped)]
    assert epochs[0] == epochs[1] == ["1", "2"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--bits", "1", "--epochs", "1"],
        ["--bits", "ternary", "--method", "ste", "--epochs", "1"],
        ["--bits", "8", "--epochs", "0"],
        ["--weight-bits", "3", "--act-bits", "32", "--epochs", "1"],
        ["--bits", "32", "--epochs", "1"],
    ],
    ids=" ".join,
)
def test_other_widths(digits_run: Callable[..., Path], flags: list[str]) -> None:
    folder = digits_run(*flags)
    report = json.loads((folder / "report.json").read_text())
    assert report["onnx"]["agreement_unoptimized"] >= 99.7
    assert report["onnx"]["top1"] > 60
    if "0" in flags:
        assert report["onnx"]["top1"] >= report["float"]["top1"] - 1
        assert report["training"]["steps"] == 0
    onnx.checker.check_model(onnx.load(folder / "model.onnx"), full_check=True)


def test_a_float_run_is_a_model_to_quantize(
    digits_run: Callable[..., Path], tmp_path: Path
) -> None:
    base = digits_run("--bits", "32", "--epochs", "1")
    report = ricciq("quantize", base, "--data", "digits", "--bits", "4", "--epochs", "0",
                    "--output", tmp_path / "low")  # fmt: skip
    assert report["model"] == "digits_resnet8"
    trained = json.loads((base / "report.json").read_text())
    assert report["float"]["top1"] == trained["quantized"]["top1"] == trained["float"]["top1"]
    ricciq("quantize", tmp_path / "low", "--data", "digits", "--output", tmp_path / "x", expect=3)


def test_a_model_of_timm_from_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = timm.create_model("test_resnet", num_classes=7).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    recipe = tmp_path / "small.yaml"
    recipe.write_text("data: {input_size: 32, train_samples: 64}\n")
    report = ricciq(
        "quantize", "test_resnet", "--data", "digits", "--bits", "4", "--epochs", "1",
        "--checkpoint", tmp_path / "weights.safetensors", "--recipe", recipe,
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert any("7" in message for message in report["messages"])  # the head was replaced
    assert inspect_onnx(tmp_path / "run" / "model.onnx").fused_share() == 100
    assert report["onnx"]["agreement_unoptimized"] >= 99.5


@needs_fashion
def test_fashion_mnist_through_timm(tmp_path: Path) -> None:
    root = lay_out_fashion_mnist(tmp_path / "data")
    recipe = tmp_path / "short.yaml"
    recipe.write_text("data: {train_samples: 2000, batch_size: 100}\n")
    report = ricciq(
        "quantize", "fashion_resnet8", "--data", "torch/fashion_mnist", "--data-dir", root,
        "--bits", "4", "--epochs", "1", "--recipe", recipe, "--output", tmp_path / "run",
    )  # fmt: skip
    assert report["float"]["top1"] >= 92
    assert report["float"]["samples"] == 10000
    assert report["onnx"]["top1"] >= report["float"]["top1"] - 3
    assert report["onnx"]["agreement_unoptimized"] >= 99.5
    assert report["onnx"]["agreement"] >= 99.5
    assert not kernels_are_known() or report["onnx"]["agreement"] == 100.0
    assert inspect_onnx(tmp_path / "run" / "model.onnx").fused_share() == 100


@pytest.mark.skipif(os.name != "posix", reason="folder locks are tested with POSIX signals")
def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    command = [*MAIN_JOB, "--epochs", "1000", "--output", tmp_path / "run"]
    first = start(command)
    while first.poll() is None and not (tmp_path / "run" / "recipe.yaml").is_file():
        time.sleep(0.02)
    second = start([*command, "--resume"])
    _, err = second.communicate()
    assert second.returncode == 2
    assert "in use" in err
    assert first.poll() is None
    first.terminate()
    first.communicate()
    assert first.returncode == 130
