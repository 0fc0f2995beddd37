"""The script for whoever has a GPU runs to its end without one, and every part of it reports."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest
from command import ROOT

pytestmark = pytest.mark.slow

GPU = ROOT / "tests" / "gpu"


def run(*arguments):
    command = [sys.executable, str(GPU), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_part_reports_on_a_cpu(tmp_path):
    done = run("--device", "cpu", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["environment"]["device"] == "cpu"
    names = run("--list").stdout.splitlines()
    assert list(report["parts"].keys() - set(names)) == []
    for name in names:
        part = report["parts"][name]
        if name in ("main job: Fashion-MNIST", "cifar_resnet20"):
            assert part["status"] == "skipped"
            assert "--fashion" in part["reason"]
            continue
        assert part["status"] == "passed", part
        assert part["found"]["lines"]
        assert f"== {name}" in done.stdout
    step = report["parts"]["step: resnet50"]["found"]
    assert step["rows"]["ricci"]["ms"] > 0
    assert step["profiles"]["ricci"]["slowest"]
    headline = report["parts"]["headline: resnet50 from JPEGs"]["found"]
    assert headline["images_per_second"] > 0
    assert headline["waiting_seconds"] < headline["seconds"]


SCRIPT = """
import json, multiprocessing, sys
from dataclasses import asdict
from pathlib import Path

gpu, here = sys.argv[1:]
sys.path[:0] = [gpu, here]
from parts import Context, Part, run_parts

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    context, found = Context("cpu", Path(here) / "work", None), {}
    parts = [Part(name, f"faults:{name}", 6) for name in ("right", "raises", "dies", "hangs")]
    run_parts(spawn, parts, context, 60, 2, lambda name, it: found.update({name: asdict(it)}))
    late = [Part("late", "faults:right", 6)]
    run_parts(spawn, late, context, 3, 2, lambda name, it: found.update({name: asdict(it)}))
    print(json.dumps(found))
"""
FAULTS = """
import os, subprocess, sys, time

def right(context, tell):
    tell({"lines": ["well"]})

def raises(context, tell):
    tell({"half": 1})
    raise ValueError("this is wrong")

def dies(context, tell):
    os._exit(7)

def hangs(context, tell):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    tell({"pid": child.pid})
    time.sleep(600)
"""


def test_one_fault_does_not_hide_the_rest(tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(GPU), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    ends = {name: (part["status"], part["reason"]) for name, part in found.items()}
    assert ends == {
        "right": ("passed", ""),
        "raises": ("failed", "ValueError: this is wrong"),
        "dies": ("failed", "its process ended with 7"),
        "hangs": ("stopped", "ran past its 6 s"),
        "late": ("skipped", "3 s were left"),
    }
    assert found["right"]["found"] == {"lines": ["well"]}
    assert found["raises"]["found"] == {"half": 1}
    assert found["raises"]["log"][-1] == "ValueError: this is wrong"
    child = found["hangs"]["found"]["pid"]  # what a part starts ends with it
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"
