"""Other people's machines: full disks, no shared memory, no compiler, a library that is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import processes
import pytest
from command import MAIN_JOB
from PIL import Image

pytestmark = pytest.mark.slow

QUICK = "quantization: {reconstruction: 0, scale_search: 2}\n"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise, 300 pixels wide, with a recipe that takes little time."""
    folder, chance = tmp_path_factory.mktemp("photographs"), np.random.RandomState(0)
    for split in ("train", "val"):
        for tone, name in ((60, "cat"), (180, "dog")):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(20):
                noise = np.clip(tone + 20 * chance.randn(300, 300, 3), 0, 255)
                Image.fromarray(noise.astype("uint8")).save(place / f"{number}.png")
    (folder / "quick.yaml").write_text(f"model: {{pretrained: false}}\n{QUICK}")
    return folder


def words_on(photographs: Path, output: Path, *flags: str) -> list[str]:
    given = ["quantize", "test_resnet", "--recipe", str(photographs / "quick.yaml"), "--data"]
    given += [str(photographs), "--bits", "8", "--epochs", "1", "--batch-size", "8"]
    return [*given, "--output", str(output), *flags]


def run(
    *words: str, environment: Mapping[str, str] | None = None, mount: str = ""
) -> subprocess.CompletedProcess[str]:
    """A command in its own process, and with `mount` in its own view of the file system."""
    command = [sys.executable, "-m", "ricciq", *words]
    if mount:
        if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
            pytest.skip("this machine does not let us mount")
        command = ["unshare", "-m", "bash", "-c", f'mount {mount} && exec "$@"', "-", *command]
    return subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def problems_of(environment: Mapping[str, str] | None = None, mount: str = "") -> str:
    """What `ricciq doctor` finds there."""
    found = run("doctor", "--json", environment=environment, mount=mount).stdout
    return "; ".join(problem["what"] for problem in json.loads(found)["problems"])


def test_a_full_temporary_folder(tmp_path: Path) -> None:
    small, run_folder = tmp_path / "small", tmp_path / "run"
    small.mkdir()
    (tmp_path / "quick.yaml").write_text(QUICK)
    mounted = {
        "environment": {"TMPDIR": str(small)},
        "mount": f"-t tmpfs -o size=64k tmpfs {small}",
    }
    flags = ["--recipe", str(tmp_path / "quick.yaml"), "--epochs", "1", "--output", str(run_folder)]
    done = run(*MAIN_JOB, *flags, **mounted)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    assert [path.name for path in run_folder.iterdir() if path.name.startswith(".scratch")] == []
    done = run("inspect", str(run_folder / "model.onnx"), **mounted)  # type: ignore[arg-type]
    assert done.returncode == 1
    assert f"cannot write the unpacked weights of {run_folder / 'model.onnx'}" in done.stderr
    assert "set TMPDIR to a folder on another disk" in done.stderr
    assert f"GB are free in {small}" in problems_of(**mounted)  # type: ignore[arg-type]


def test_little_shared_memory(photographs: Path, tmp_path: Path) -> None:
    small = "-t tmpfs -o size=500k tmpfs /dev/shm"
    words = words_on(photographs, tmp_path / "run", "--quiet")
    done = run(*words, "--workers", "2", mount=small)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()  # and no complaints of workers that are left
    assert line.startswith("ricciq: a process that decodes images ended")
    assert "shared memory" in line
    assert line.endswith("give --workers 0")
    done = run(*words, "--overwrite", mount=small)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_shared_memory(photographs: Path, tmp_path: Path) -> None:
    locked = "-t tmpfs -o ro tmpfs /dev/shm"
    words = words_on(photographs, tmp_path / "run", "--quiet")
    done = run(*words, "--workers", "2", mount=locked)
    assert done.returncode == 2
    assert "--workers 2 pass images through shared memory, which cannot be used" in done.stderr
    done = run(*words, "--overwrite", mount=locked)
    assert (done.returncode, done.stderr) == (0, "")
    assert "processes cannot share memory" in problems_of(mount=locked)


def test_a_damaged_image_leaves_no_workers(photographs: Path, tmp_path: Path) -> None:
    """A worker that is waited for at the end holds the command up for half a minute."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for file in (photographs / split / name).iterdir():
                (tmp_path / split / name / file.name).symlink_to(file)
    damaged = tmp_path / "train" / "cat" / "3.png"
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content[:2000])
    words = words_on(photographs, tmp_path / "run", "--quiet", "--workers", "2")
    words[words.index("--data") + 1] = str(tmp_path)
    # The alarm by which a stuck worker ends is shorter than its patience: it would be seen.
    code = "import ricciq.data.loader as loader; loader.SECONDS_TO_CLOSE = 1"
    started = processes.start(words, code=code)
    _, err = started.communicate()
    assert started.returncode == 3
    (line,) = err.splitlines()
    assert f"image {damaged} cannot be read" in line


def test_no_compiler(tmp_path: Path) -> None:
    tools, environment = tmp_path / "bin", {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    tools.mkdir()
    flags = ["--epochs", "1", "--compile", "--output", str(tmp_path / "run")]
    done = run(*MAIN_JOB, *flags, environment={**environment, "PATH": str(tools)})
    assert done.returncode == 1
    assert "torch.compile fails" in done.stderr
    assert "give --no-compile, or install what it lacks, such as a C++ compiler" in done.stderr
    assert "there is no C++ compiler" in problems_of(environment={"PATH": str(tools)})


def test_a_broken_library(tmp_path: Path) -> None:
    """As an old protobuf beside a new onnx."""
    (tmp_path / "onnx.py").write_text("raise TypeError('Descriptors cannot be created directly.')")
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = run(*MAIN_JOB, environment=environment)
    assert done.returncode == 1
    assert "Descriptors cannot be created directly" in done.stderr
    assert "`ricciq doctor` says which one" in done.stderr
    assert "epoch" not in done.stderr
    assert "onnx 1." in problems_of(environment)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    (tmp_path / "quick.yaml").write_text(QUICK)
    words = [*MAIN_JOB, "--recipe", "quick.yaml", "--epochs", "0", "--quiet"]
    started = processes.start(words, cwd=tmp_path)
    _, err = started.communicate()
    assert started.returncode == 2
    assert "cannot be written" in err


def test_two_runs_in_one_second(tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text(QUICK)
    words = [*MAIN_JOB, "--recipe", "quick.yaml", "--epochs", "0", "--quiet"]
    # So that both choose their folder in the same second, whenever it is.
    code = """
import ricciq.runs.folder as folder
from datetime import datetime
class Stopped(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 1)
folder.datetime = Stopped
"""
    started = [processes.start(words, code=code, cwd=tmp_path) for _ in range(3)]
    for process in started:
        _, err = process.communicate()
        assert process.returncode == 0, err
    name = "20260101-000000-digits_resnet8-w2a2"
    made = {path.name for path in (tmp_path / "runs").iterdir()}
    assert made == {name, f"{name}-2", f"{name}-3"}
    for folder in made:
        assert (tmp_path / "runs" / folder / "report.json").is_file()
