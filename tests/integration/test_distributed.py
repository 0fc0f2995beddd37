"""Two processes that train together do what one does with batches twice as large."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import start

from ricciq.data.loader import set_epoch
from ricciq.data.open import open_data
from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import UsageError
from ricciq.system.distributed import World, joined, local_device
from ricciq.system.tables import read_csv

pytestmark = pytest.mark.slow

# Few steps at a low rate: a code that falls to the other side of a threshold for a last bit changes
# what follows, and the two drift apart.
RECIPE = """
model: {{name: digits_resnet8}}
data: {{name: digits, batch_size: {batch_size}, train_samples: 400}}
quantization: {{weight_bits: 2, act_bits: 2}}
training: {{epochs: 2, lr: 0.0001, freeze_bn: true, grad_accum_steps: {accumulated}}}
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ricciq"]


def launch(processes: int, *arguments: str | Path, expect: int = 0) -> tuple[str, str]:
    """Start a command as torchrun would, and return what the processes printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    started = [
        start(arguments, environment=world | {"RANK": str(n), "LOCAL_RANK": str(n)})
        for n in range(processes)
    ]
    printed = [process.communicate() for process in started]
    for process, (_, err) in zip(started, printed, strict=True):
        assert process.returncode == expect, err
    out, err = ("".join(streams) for streams in zip(*printed, strict=True))
    return out, err


def write_recipe(folder: Path, batch_size: int, accumulated: int = 1) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(batch_size=batch_size, accumulated=accumulated))
    return recipe


@pytest.fixture(scope="session")
def alone(run_once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("alone"), batch_size=40)
    return run_once("alone", "quantize", "digits_resnet8", "--recipe", recipe)


@pytest.mark.parametrize(
    ("processes", "batch_size", "accumulated"),
    [(2, 20, 1), (1, 20, 2), (2, 10, 2)],
    ids=["two processes", "two batches a step", "both"],
)
def test_a_batch_in_parts_gives_the_losses_of_the_whole(
    alone, tmp_path, processes, batch_size, accumulated
):
    recipe, parted = write_recipe(tmp_path, batch_size, accumulated), tmp_path / "run"
    flags = ["--recipe", recipe, "--output", parted, "--json"]
    printed, _ = launch(processes, "quantize", "digits_resnet8", *flags)
    assert len(printed.splitlines()) == 1, "the first process alone speaks"
    rows, expected = (read_csv(folder / "summary.csv") for folder in (parted, alone))
    assert len(rows) == 2
    for row, same in zip(rows, expected, strict=True):
        for name in ("train_loss", "holdout_loss"):
            # Sums in another order may round a number beside a threshold to another code.
            assert float(row[name]) == pytest.approx(float(same[name]), rel=5e-4)
        assert float(row["lr"]) == float(same["lr"])


def test_the_hold_out_need_not_come_out_even(tmp_path):
    """Of 37 pictures one process has a batch more than the other."""
    flags = ["--output", tmp_path / "run", "--epochs", "1", "--batch-size", "6", "--json"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {name: digits, train_samples: 60, holdout: 0.026}\n")
    line = [*TORCHRUN, "quantize", "digits_resnet8", "--recipe", recipe, *flags]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == 10


def test_what_the_first_process_refuses_is_said_once(tmp_path):
    (tmp_path / "mine").write_text("something of the user's")
    line = ["quantize", "digits_resnet8", "--data", "digits", "--output", tmp_path]
    _, err = launch(2, *line, expect=2)
    said = [line for line in err.splitlines() if line.startswith("ricciq: ")]
    assert said == [
        f"ricciq: --output {tmp_path} has files that are not a run of ricciq; choose another folder"
    ]


def batches(world: World, epoch: int = 0, skip: int = 0) -> list[torch.Tensor]:
    loader = open_data("digits", None).loader(
        "fit",
        Preprocessing((1, 8, 8), (0.5,), (0.5,)),
        batch_size=30,
        workers=0,
        training=True,
        world=world,
    )
    set_epoch(loader, epoch, skip)
    return [images for images, _ in loader]


def test_processes_share_each_step_of_one():
    shares = [batches(World(rank, 3), epoch=1) for rank in range(3)]
    whole = torch.cat(batches(World(), epoch=1))
    together = [torch.cat(step) for step in zip(*shares, strict=True)]
    assert torch.equal(torch.cat(together), whole[: len(together) * 90])
    assert all(
        torch.equal(a, b) for a, b in zip(batches(World(1, 3), 1, 2), shares[1][2:], strict=True)
    )


def test_too_few_images_for_all_processes_are_refused():
    with pytest.raises(UsageError, match=r"fewer than 30 for each of 100 .*; lower"):
        batches(World(0, 100))


@pytest.mark.parametrize(
    ("name", "environment", "device"),
    [
        ("cuda:3", {}, "cuda:3"),
        ("auto", {"WORLD_SIZE": "1"}, "auto"),
        ("cuda", {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cuda:1"),
        ("cpu", {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cpu"),
    ],
)
def test_each_process_takes_a_device_of_its_own(name, environment, device):
    assert local_device(name, environment) == device


def test_one_gpu_for_several_processes_is_refused():
    with pytest.raises(UsageError, match=r"--device cuda:0 is one device for 2 processes"):
        local_device("cuda:0", {"WORLD_SIZE": "2"})


def test_a_process_alone_is_a_world():
    with joined(torch.device("cpu"), {}) as world:
        assert (world.is_first, world.size) == (True, 1)
        assert world.from_first(lambda: 5) == 5
        assert world.gather(6) == [6]
        assert world.any(True)
        assert world.total(torch.tensor(7)) == 7
