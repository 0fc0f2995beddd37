"""The state of a run: saved atomically, and restored bit for bit."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from ricciq.errors import CheckpointError, RicciqError
from ricciq.system.files import write_atomically
from ricciq.system.tensor_files import (
    State,
    load_model_state,
    load_tensors,
    restore_training_state,
    save_tensors,
    training_state,
)

# The usual ones, and two whose parameter groups also hold tensors and types.
OPTIMIZERS = ["adamw", "sgd", "momentum", "lamb", "adafactorbv"]
FUSED = {"adamw", "sgd", "momentum"}


@pytest.fixture(autouse=True)
def _random_state_kept():
    with torch.random.fork_rng():
        yield


def make(
    opt: str, layout: torch.memory_format = torch.contiguous_format
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(16, 5)
    ).to(memory_format=layout)
    options = {"fused": True} if opt in FUSED else {}
    return model, create_optimizer_v2(model, opt=opt, lr=0.01, weight_decay=0.1, **options)


def stored(path: Path) -> State:
    return State(*load_tensors(path), path)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps on random images with random dropout, both of which follow from a step's number."""
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 3, 4, 4)).square().mean().backward()
        optimizer.step()


def same(a, b) -> bool:
    """Equal values in equal structures, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and all(map(same, a, b))
    return a == b


def test_tensors_and_metadata_are_read_as_they_were_written(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {
        "whole": whole,
        "same": whole,
        "row": whole[1],
        "transposed": whole.T,
        "expanded": torch.ones(1).expand(3),
        "scalar": torch.tensor(7),
        "bool": torch.tensor([True, False]),
        "half": torch.tensor([0.5], dtype=torch.bfloat16),
        "none": torch.zeros(0, 2),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    metadata = {"epoch": 3, "best": 1 / 3, "names": ["a", "ü"], "deep": {"x": None}}
    save_tensors(tmp_path / "x.safetensors", tensors, metadata)
    back, about = load_tensors(tmp_path / "x.safetensors")
    assert same(back, {name: tensor.detach() for name, tensor in tensors.items()})
    assert about == metadata


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_resumed_training_equals_uninterrupted_training(tmp_path, opt, layout):
    torch.manual_seed(0)
    model, optimizer = make(opt, layout)
    train(model, optimizer, range(2))
    tensors, metadata = training_state(model, optimizer, {"epoch": 1, "best": 0.1})
    save_tensors(tmp_path / "last.safetensors", tensors, metadata)
    at_save = copy.deepcopy(optimizer.state_dict()["param_groups"])
    train(model, optimizer, range(2, 4))

    torch.manual_seed(1)
    again, its_optimizer = make(opt, layout)
    progress = restore_training_state(again, its_optimizer, stored(tmp_path / "last.safetensors"))
    assert progress == {"epoch": 1, "best": 0.1}
    assert same(its_optimizer.state_dict()["param_groups"], at_save)
    train(again, its_optimizer, range(2, 4))
    assert same(model.state_dict(), again.state_dict())
    assert same(optimizer.state_dict(), its_optimizer.state_dict())


def test_nested_optimizer_values_are_restored(tmp_path):
    model, optimizer = make("sgd")
    parameter = next(model.parameters())
    values = {"list": [torch.ones(2), 3], "tuple": (1, None, [2.5]), "type": torch.float16}
    optimizer.state[parameter] = values
    save_tensors(tmp_path / "x", *training_state(model, optimizer, {}))
    again, its_optimizer = make("sgd")
    restore_training_state(again, its_optimizer, stored(tmp_path / "x"))
    assert same(its_optimizer.state[next(again.parameters())], values)


def damaged(path: Path, how: str) -> None:
    good = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif how == "short header":
        path.write_bytes(good[:12])
    elif how == "pickled":
        torch.save({"a": torch.ones(2)}, path)
    elif how == "foreign":
        safetensors.torch.save_file({"a": torch.ones(2)}, path)
    elif how == "foreign metadata":
        safetensors.torch.save_file({"a": torch.ones(2)}, path, {"ricciq": "{not json"})
    else:
        safetensors.torch.save_file({"a": torch.ones(2)}, path, {"ricciq": "[" * 100_000})


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "a folder",
        "empty",
        "truncated",
        "short header",
        "pickled",
        "foreign",
        "foreign metadata",
        "deep metadata",
    ],
)
def test_a_damaged_file_is_refused(tmp_path, how):
    path = tmp_path / "best.safetensors"
    save_tensors(path, {"a": torch.ones(100)}, {})
    damaged(path, how)
    with pytest.raises(CheckpointError, match=r"best\.safetensors") as caught:
        load_tensors(path)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def changed_state(tensors: dict, metadata: dict, how: str) -> None:
    if how == "no optimizer":
        del metadata["optimizer"]
    elif how == "no groups":
        metadata["optimizer"]["param_groups"] = []
    elif how == "null state":
        metadata["optimizer"]["state"] = None
    elif how == "a tensor missing":
        del tensors[next(name for name in tensors if name.startswith("optimizer."))]
    else:
        tensors["model.0.weight"] = torch.ones(2, 2)


@pytest.mark.parametrize(
    "how",
    [
        "no optimizer",
        "no groups",
        "null state",
        "a tensor missing",
        "another model",
    ],
)
def test_the_state_of_something_else_is_refused(tmp_path, how):
    model, optimizer = make("adamw")
    train(model, optimizer, range(1))
    tensors, metadata = training_state(model, optimizer, {})
    metadata = json.loads(json.dumps(metadata))
    changed_state(tensors, metadata, how)
    save_tensors(tmp_path / "last.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError, match=r"last\.safetensors"):
        restore_training_state(*make("adamw"), stored(tmp_path / "last.safetensors"))


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    model, optimizer = make("adamw")
    save_tensors(tmp_path / "x", *training_state(model, optimizer, {}))
    plain = torch.optim.SGD(model.parameters(), lr=0.1)  # one group of parameters instead of two
    with pytest.raises(CheckpointError, match="not the state of this run"):
        restore_training_state(model, plain, stored(tmp_path / "x"))


@pytest.mark.parametrize(
    "change",
    [{"weight": torch.ones(3, 3)}, {"weight": None}, {"more": torch.ones(1)}],
    ids=["shape", "missing", "unexpected"],
)
def test_a_state_that_does_not_fit_is_refused(change):
    model = nn.Linear(2, 2)
    tensors = {**model.state_dict(), **change}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_model_state(model, tensors, Path("x.safetensors"))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "last.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {"epoch": 1})

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), full)
    with pytest.raises(RicciqError, match=r"last\.safetensors .*No space left") as caught:
        save_tensors(path, {"a": torch.zeros(2)}, {"epoch": 2})
    assert caught.value.exit_code == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.safetensors"]
    tensors, metadata = load_tensors(path)
    assert tensors["a"].tolist() == [1, 1]
    assert metadata == {"epoch": 1}


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "x", "old")

    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x", "old")]


@pytest.mark.parametrize("name", ["missing/x", "file/x", "x" * 300])
def test_a_place_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(RicciqError, match="cannot write"):
        write_atomically(tmp_path / name, "text")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_text_and_bytes_are_written_as_they_are(tmp_path):
    write_atomically(tmp_path / "x", "äß\r\n")
    assert (tmp_path / "x").read_bytes() == "äß\r\n".encode()
    write_atomically(tmp_path / "x", b"\x00\xff")
    assert (tmp_path / "x").read_bytes() == b"\x00\xff"


def test_the_replaced_file_can_be_kept(tmp_path):
    path, previous = tmp_path / "last", tmp_path / "previous"
    for text in ("first", "second", "third"):
        write_atomically(path, text, previous)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "last": "third",
        "previous": "second",
    }


FILL_THE_DISK = """
import resource, sys, torch
from pathlib import Path
from ricciq.system.tensor_files import save_tensors
from ricciq.errors import RicciqError

path, previous = Path(sys.argv[1], "last"), Path(sys.argv[1], "previous")
save_tensors(path, {"a": torch.zeros(10)}, {}, previous)
save_tensors(path, {"a": torch.ones(10)}, {}, previous)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # writes fail there as on a full disk
try:
    save_tensors(path, {"a": torch.zeros(10_000)}, {}, previous)
except RicciqError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_both_states(tmp_path):
    command = [sys.executable, "-c", FILL_THE_DISK, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    (sentence,) = ended.stderr.splitlines()
    assert sentence.startswith(f"cannot write {tmp_path / 'last'} (")
    assert "free some space" in sentence
    assert {file.name for file in tmp_path.iterdir()} == {"last", "previous"}
    assert load_tensors(tmp_path / "last")[0]["a"].tolist() == [1] * 10
    assert load_tensors(tmp_path / "previous")[0]["a"].tolist() == [0] * 10
