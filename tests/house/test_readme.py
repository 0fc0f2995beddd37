"""The README's commands, its Python and its JavaScript, taken from the page itself."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command import check_command, json_of, ricciq
from PIL import Image
from torch import nn

from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.export import export_onnx

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    called = [part for line in lines for part in line.split(" && ")]
    return [shlex.split(part, comments=True) for part in called if part.startswith("ricciq ")]


def test_the_page_begins_with_the_two_set_up_commands() -> None:
    first, second = blocks("bash")[:2]
    main_job = "ricciq quantize digits_resnet8 --data digits --bits 2"
    assert first.strip() == f"pip install . && {main_job}"
    assert second.strip().startswith("pip install '.[test]' && ")
    assert second.strip().endswith("pytest")
    assert sum(line.startswith("pip install") for line in README.splitlines()) == 2


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_names_verbs_options_and_recipes_that_exist(command: list[str]) -> None:
    check_command(command)


@pytest.fixture
def in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer_of(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Stands in for `subprocess.run` of a command."""
    assert words[0] == "ricciq"
    answer = ricciq(*words[1:])
    return subprocess.CompletedProcess(words, answer.code, answer.out, answer.err)


@pytest.mark.slow
def test_the_python_runs(
    in_a_shell: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, parts, _, _ = blocks("python")
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", answer_of)
        exec(compile(script, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert re.match(r"1 bits: -?\d", said)
    runs = in_a_shell / "runs"
    assert (in_a_shell / said.splitlines()[-1] / "report.html").is_file()
    before = len(list(runs.iterdir()))
    exec(compile(parts, "README.md", "exec"), {})
    assert len(list(runs.iterdir())) == before + 1
    assert "model.onnx" in capsys.readouterr().out


@pytest.mark.slow
def test_any_classifier_is_quantized(in_a_shell: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = blocks("python")[2]
    assert len(own.splitlines()) < 20
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(own, "README.md", "exec"), {})
    found = re.search(r"top1=([\d.]+).* agreement=([\d.]+)", capsys.readouterr().out)
    assert found
    assert float(found[1]) > 90
    assert float(found[2]) > 99
    assert [path.name for path in in_a_shell.iterdir()] == ["own.onnx"]


LIGHTS = {3: ["rot", "grün", "blau"], 1: ["hell", "dunkel"]}
"""Classes of files with as many channels."""


@pytest.fixture(params=LIGHTS)
def images(in_a_shell: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The classes of noisy images, each in cat.png, beside a file that tells them."""
    channels: int = request.param
    weight = torch.eye(3) if channels == 3 else torch.tensor([[1.0], [-1.0]])
    linear = nn.Linear(channels, len(weight), bias=False)
    linear.weight.data = weight
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    about = Preprocessing((channels, 12, 16), (0.5, 0.4, 0.3)[:channels], (0.25,) * channels)
    path = in_a_shell / "model-uint8.onnx"
    export_onnx(model, path, about, {"class_names": LIGHTS[channels]}, input_type="uint8")

    def each() -> Iterator[str]:
        for number, name in enumerate(LIGHTS[channels]):
            pixels = np.random.default_rng(0).integers(0, 128, (12, 16, 3), dtype=np.uint8)
            lit = [number] if channels == 3 else [0, 1, 2][: 3 - 3 * number]
            pixels[..., lit] += 100
            Image.fromarray(pixels).save("cat.png")
            (row,) = json_of("predict", path, "cat.png")["images"]
            assert row["classes"][0]["class"] == name
            yield name

    return each()


def test_the_python_without_ricciq_runs(
    images: Iterator[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = blocks("python")[3]
    assert len(own.splitlines()) <= 11
    assert "from ricciq" not in own
    script = compile(own, "README.md", "exec")
    for colour in images:
        exec(script, {})
        assert capsys.readouterr().out.strip() == colour


def node_modules() -> Path | None:
    """The folder where npm has installed what the JavaScript imports, here or for all users."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return None
    line = ["npm", "root", "--global"]
    shared = subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip()
    for folder in (ROOT / "node_modules", Path(shared)):
        if all((folder / name).is_dir() for name in ("onnxruntime-node", "sharp")):
            return folder
    return None


def test_the_javascript_runs(images: Iterator[str], in_a_shell: Path) -> None:
    installed = node_modules()
    if installed is None:
        pytest.skip("it needs Node.js and `npm install onnxruntime-node sharp`")
    (script,) = blocks("js")
    assert len(script.splitlines()) <= 12
    (in_a_shell / "node_modules").symlink_to(installed)
    (in_a_shell / "run.mjs").write_text(script)
    for colour in images:
        line = ["node", "run.mjs"]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
        assert (done.stdout.strip(), done.returncode) == (colour, 0), done.stderr


@pytest.mark.slow
def test_the_job_for_a_pipeline_runs(in_a_shell: Path) -> None:
    (job,) = blocks("yaml")
    steps = yaml.safe_load(job)["jobs"]["quantize"]["steps"]
    lines = [step["run"] for step in steps if step.get("run", "").startswith("ricciq")]
    assert len(lines) == 2
    for line in lines:
        words, _, file = line.partition(" > ")
        answer = ricciq(*shlex.split(words)[1:])
        assert answer.code == 0, answer.err
        if file:
            (in_a_shell / file.strip()).write_text(answer.out)
    report = json.loads((in_a_shell / "report.json").read_text())
    assert report == {
        **json.loads((in_a_shell / "runs" / "ci" / "report.json").read_text()),
        "run_folder": "runs/ci",
    }
