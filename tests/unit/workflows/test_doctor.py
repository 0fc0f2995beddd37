"""`ricciq doctor`: what it shows, and the problems that it finds."""

from __future__ import annotations

import json
import tempfile
from collections import namedtuple
from importlib.metadata import version

import psutil
import pytest
import torch
from command import ricciq

from ricciq.workflows import doctor

Disk = namedtuple("Disk", "total used free")


def whats() -> list[str]:
    return [problem["what"] for problem in doctor.examine()["problems"]]


def test_it_says_what_is_there():
    answer = ricciq("doctor", "--json")
    assert answer.code == 0
    values = json.loads(answer.out)
    assert values["versions"]["torch"] == version("torch")
    assert values["threads"] == torch.get_num_threads()
    assert "CPUExecutionProvider" in values["providers"]
    assert len(values["cuda"]) == torch.cuda.device_count()
    assert values["cpu"]["usable"] >= 1
    assert values["memory_gb"]["total"] > 0.1
    shown = ricciq("doctor").out
    assert "onnxruntime" in shown
    assert "CPUExecutionProvider" in shown


@pytest.mark.parametrize("module", ["torchvision", "yaml"])
def test_what_does_not_import_is_reported_and_fails(monkeypatch, module):
    def broken(name):
        if name == module:
            raise RuntimeError("operator nms\ndoes not exist")

    monkeypatch.setattr(doctor, "import_module", broken)
    answer = ricciq("doctor", "--json")
    assert answer.code == 1
    assert "cannot be imported (operator nms does not exist); " in answer.err
    (problem,) = (p for p in json.loads(answer.out)["problems"] if p["essential"])
    assert module.removeprefix("py") in problem["what"]


def test_missing_and_old_packages_are_reported(monkeypatch):
    needed = ["torch>=99.1", "no-such-package>=1", "datasets>=3; extra == 'hf'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: needed)
    monkeypatch.setattr(doctor.util, "find_spec", lambda _: None)
    problems = {p["what"]: p for p in doctor.examine()["problems"]}
    assert problems[f"torch is {version('torch')}, but >=99.1 is needed"]["essential"] is False
    assert problems["no-such-package is not installed"] == {
        "what": "no-such-package is not installed",
        "remedy": "pip install 'no-such-package>=1'",
        "essential": True,
    }
    assert problems["--data hfds/NAME needs datasets"]["remedy"] == "pip install 'ricciq[hf]'"


def test_a_source_tree_that_is_not_installed_is_reported(monkeypatch):
    def missing(_):
        raise doctor.metadata.PackageNotFoundError

    monkeypatch.setattr(doctor.metadata, "requires", missing)
    assert "ricciq is found but not installed" in whats()


def test_a_full_disk_a_locked_folder_and_little_memory_are_reported(monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Disk(64e6, 0, 64e6))
    memory = psutil.virtual_memory()._replace(available=1_000_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    told = " ".join(whats())
    for words in (
        "cannot be written (Permission denied)",
        "0.06 GB are free in",
        "1.00 GB of memory",
    ):
        assert words in told


def test_a_cpu_without_integer_instructions_and_a_torch_without_cuda_are_reported(monkeypatch):
    plain = {"name": "x86", "cores": 64, "usable": 64, "instructions": ["avx2"]}
    monkeypatch.setattr(doctor, "_cpu", lambda: plain)
    monkeypatch.setattr(torch.version, "cuda", None)
    told = " ".join(whats())
    for words in ("VNNI", "built without CUDA", f"{torch.get_num_threads()} of 64 processors"):
        assert words in told


def test_cuda_devices_are_reported_with_their_memory(monkeypatch):
    card = namedtuple("Card", "name total_memory")("NVIDIA X", 80_000_000_000)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert doctor.examine()["cuda"] == [{"name": "NVIDIA X", "memory_gb": 80.0}]
    assert not any("CUDA" in what for what in whats())
