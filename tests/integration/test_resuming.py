"""Runs that end at any moment, by a kill, a signal or a full disk, lose nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from processes import Process

from ricciq.runs.folder import RunFolder
from ricciq.system.journal import Journal
from ricciq.system.tables import read_csv
from ricciq.system.tensor_files import load_tensors
from ricciq.training.state import last_state

pytestmark = pytest.mark.slow

KILLS = 20
RECIPE = """
model: {name: digits_resnet8}
data:
  {name: digits, batch_size: 16, train_samples: 768, augmentation: {pad_crop: 1, hflip: 0.0}}
quantization: {weight_bits: 2, act_bits: 2}
training: {epochs: 2, lr: 0.004, grad_accum_steps: 2, save_minutes: 0}
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that saves its state after every step."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def start(recipe: Path, output: Path, *flags: str, code: str = "") -> Process:
    """A run in a process of its own; `code` is executed in it first."""
    arguments = ["quantize", "digits_resnet8", "--recipe", recipe, "--output", output, *flags]
    return processes.start(arguments, code=code)


def progress(output: Path) -> dict[str, Any]:
    """What the readable copy of the state says."""
    values: dict[str, Any] = json.loads((output / "state.json").read_text())
    return values


def finish(process: Process, expect: int = 0) -> str:
    _, err = process.communicate()
    assert process.returncode == expect, err
    assert "Traceback" not in err
    return err


def steps(output: Path) -> int:
    """Optimizer steps that are saved."""
    return progress(output)["steps"] if (output / "state.json").is_file() else 0


@pytest.fixture(scope="session")
def undisturbed(recipe: Path, run_once: Callable[..., Path]) -> Path:
    return run_once("undisturbed", "quantize", "digits_resnet8", "--recipe", recipe)


def assert_same(output: Path, undisturbed: Path) -> None:
    """Bit for bit: weights, optimizer, codes, file; and every row but for the speed."""
    for name in ("last", "best"):
        tensors, about = load_tensors(output / f"{name}.safetensors")
        expected, same = load_tensors(undisturbed / f"{name}.safetensors")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
        for values in (about, same):
            values.get("progress", {}).pop("seconds", None)
            sections = values.get("recipe", {"training": {}, "data": {}})
            sections["training"].pop("save_minutes", None)
            sections["data"].pop("workers", None)
        assert about == same
    if (output / "recipe.yaml").read_text() == (undisturbed / "recipe.yaml").read_text():
        for name in ("model.onnx", "float.onnx"):
            assert (output / name).read_bytes() == (undisturbed / name).read_bytes()
    assert read_csv(output / "geometry.csv") == read_csv(undisturbed / "geometry.csv")
    rows, expected_rows = (read_csv(folder / "summary.csv") for folder in (output, undisturbed))
    for row in (*rows, *expected_rows):
        del row["images_per_second"], row["waiting_share"]
    assert rows == expected_rows


def test_twenty_kills_at_random_moments_change_nothing(recipe, undisturbed, tmp_path):
    output, chance = tmp_path / "run", random.Random(4)
    total, killed_at = steps(undisturbed), []
    for kill in range(KILLS):
        process = start(recipe, output, *(["--resume"] if kill else []))
        before = steps(output)
        wanted = before + chance.randint(1, max(1, (total - before) // (KILLS - kill) - 2))
        while process.poll() is None and steps(output) < wanted:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))  # a step and a save take about as long
        process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
        killed_at.append(steps(output))
    assert len(set(killed_at)) == KILLS, killed_at
    assert not (output / "report.json").exists()
    finish(start(recipe, output, "--resume"))
    assert_same(output, undisturbed)


# The third save of a state is killed before, between or after the renamings, or before the data
# are on the disk.
KILL_WHILE_WRITING = """
import os, signal
from pathlib import Path
from typing import Any

moments = []
def dies(original, at):
    def call(*arguments):
        if at == "fsync" or "last.safetensors" in str(arguments[0]):
            moments.append(at)
            if moments.count(at) == {count}:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)
    return call
if {where!r} == "fsync":
    os.fsync = dies(os.fsync, "fsync")
else:
    Path.replace = dies(Path.replace, "replace")
"""


@pytest.mark.parametrize(
    ("where", "count"),
    [("fsync", 25), ("replace", 4), ("replace", 5)],
    ids=["before the data are on the disk", "before the renaming", "between two renamings"],
)
def test_a_kill_while_writing_changes_nothing(recipe, undisturbed, tmp_path, where, count):
    output = tmp_path / "run"
    process = start(recipe, output, code=KILL_WHILE_WRITING.format(where=where, count=count))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    states = [output / f"{name}.safetensors" for name in ("last", "previous")]
    assert any(path.is_file() for path in states)
    if count == 5:
        assert [path.is_file() for path in states] == [False, True]
    finish(start(recipe, output, "--resume"))
    assert_same(output, undisturbed)
    assert not list(output.glob(".*.tmp"))


SLOWLY = """
import time
from ricciq.training.step import Trainer

step = Trainer.step
def slow(*arguments, **options):
    time.sleep(0.1)
    return step(*arguments, **options)
Trainer.step = slow
"""
NOTE_FIRST_STEP = """
from pathlib import Path
from typing import Any
from ricciq.training.step import Trainer

step = Trainer.step
def noting(trainer, batches, tally, update, measure):
    first = Path("{path}", "first")
    if not first.exists():
        first.write_text(str(update))
    return step(trainer, batches, tally, update, measure)
Trainer.step = noting
"""


@pytest.mark.parametrize(
    ("number", "flags"),
    [
        (signal.SIGINT, []),
        (signal.SIGTERM, ["--workers", "2"]),
        (signal.SIGHUP, ["--workers", "2"]),
    ],
    ids=["Ctrl-C", "SIGTERM to all processes", "the terminal is closed"],
)
def test_a_signal_saves_the_step_it_came_in(undisturbed, tmp_path, number, flags):
    hourly = tmp_path / "recipe.yaml"
    hourly.write_text(RECIPE.replace("save_minutes: 0", "save_minutes: 60"))
    output = tmp_path / "run"
    process = start(hourly, output, *flags, code=SLOWLY)  # the first epoch takes over two seconds
    log = output / "log.txt"
    while process.poll() is None and not (log.is_file() and "converted" in log.read_text()):
        time.sleep(0.005)
    time.sleep(1.2)  # calibration, and some steps
    os.killpg(process.pid, number)
    err = finish(process, expect=130)
    assert err.splitlines()[-1] == (
        f"ricciq: stopped; `--output {output} --resume` continues from the last saved state"
    )
    saved = progress(output)
    assert saved["batch"] > 0
    assert saved["epoch"] == 0
    finish(start(hourly, output, "--resume", *flags, code=NOTE_FIRST_STEP.format(path=tmp_path)))
    assert int((tmp_path / "first").read_text()) == saved["steps"]
    assert_same(output, undisturbed)


def test_a_damaged_state_gives_way_to_the_one_before(recipe, undisturbed, tmp_path):
    output = tmp_path / "run"
    process = start(recipe, output)
    while process.poll() is None and steps(output) < 10:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    last = output / "last.safetensors"
    last.write_bytes(last.read_bytes()[:1000])
    err = finish(start(recipe, output, "--resume"))
    assert "resuming from previous.safetensors" in err
    assert_same(output, undisturbed)


def test_a_run_without_a_state_starts_at_the_beginning(tmp_path):
    assert last_state(RunFolder(tmp_path), Journal()) is None
