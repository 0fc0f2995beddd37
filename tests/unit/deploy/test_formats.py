"""The catalogue of formats: every entry keeps its promise, and help and errors are made of it."""

from __future__ import annotations

import copy
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from command import ricciq

from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.export import export_onnx
from ricciq.deploy.formats import catalog
from ricciq.deploy.formats.catalog import FORMATS, Format, find_format
from ricciq.deploy.session import open_session, session_predictor
from ricciq.errors import UsageError

each_format = pytest.mark.parametrize("chosen", FORMATS, ids=lambda chosen: chosen.name)


def test_every_module_of_the_package_is_in_the_catalogue_and_the_other_way_round() -> None:
    found = {path.stem for path in Path(catalog.__file__).parent.glob("*.py")}
    assert {chosen.module for chosen in FORMATS} == found - {"__init__", "catalog"}
    assert (
        len({chosen.name for chosen in FORMATS}) == len({c.file for c in FORMATS}) == len(FORMATS)
    )


@each_format
def test_a_format_changes_a_deployed_model(chosen: Format) -> None:
    module = import_module(f"ricciq.deploy.formats.{chosen.module}")
    assert list(signature(module.apply).parameters) == ["deployed"]
    assert find_format(chosen.name) is chosen


@each_format
def test_a_file_of_each_format_computes_what_torch_computes(
    chosen: Format,
    exported: Any,
    pictures: torch.Tensor,
    tiny_preprocessing: Preprocessing,
    tmp_path: Path,
) -> None:
    deployed = copy.deepcopy(exported(2, 2).deployed)
    with torch.no_grad():
        expected = deployed(pictures)
        model = chosen.apply(deployed)
        assert model is deployed
        torch.testing.assert_close(model(pictures), expected, rtol=1e-5, atol=1e-5)
    path = export_onnx(model, tmp_path / chosen.file, tiny_preprocessing)
    logits = session_predictor(open_session(path, optimize=False, threads=1), path)(pictures)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert ("QuantizeLinear" in operators) == ("DequantizeLinear" in operators)
    assert ("QuantizeLinear" in operators) == (chosen.name == "qdq")


@each_format
def test_help_and_the_error_name_every_format(chosen: Format) -> None:
    shown = " ".join(ricciq("export", "--help").out.replace("│", " ").split())
    assert f"{chosen.name}: {chosen.help}" in shown
    with pytest.raises(UsageError, match=chosen.name):
        find_format("int3")


def test_an_unknown_format_is_refused_before_the_run_is_opened() -> None:
    answer = ricciq("export", "nowhere", "--format", "int3")
    assert answer.code == UsageError.exit_code
    assert answer.err == "ricciq: --format int3 is unknown; give qdq or float\n"


def test_the_catalogue_imports_no_library() -> None:
    code = (
        "import sys, ricciq.deploy.formats.catalog\n"
        "sys.exit(bool({'torch', 'onnx', 'onnx_ir', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
