"""The network: used by nobody who was not asked to, and by nobody at all with --offline."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ricciq
from safetensors.torch import save_file

from ricciq.data.sources.huggingface import open_source
from ricciq.errors import DataError, ModelError
from ricciq.models import factory as models
from ricciq.models.factory import load_model
from ricciq.system.offline import SWITCH, forbid_network, is_network_forbidden

pytestmark = pytest.mark.slow

TELEMETRY = "ORT_DISABLE_TELEMETRY"
BY_ADDRESS = "gcvit_xxtiny.in1k"
"""A model whose weights timm knows by a plain address only."""


@pytest.fixture(autouse=True)
def _switches_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for switch in (SWITCH, "HF_DATASETS_OFFLINE", TELEMETRY):
        monkeypatch.setenv(switch, "0")


@pytest.fixture
def no_socket(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whom a socket was opened to; nobody is reached."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


@pytest.mark.parametrize("flags", [[], ["--offline"]])
def test_what_comes_along_needs_no_network(
    tmp_path: Path, no_socket: list[Any], flags: list[str]
) -> None:
    recipe = tmp_path / "quick.yaml"
    recipe.write_text("quantization: {reconstruction: 0, scale_search: 2}")
    run = tmp_path / "run"
    line = f"quantize digits_resnet8 --data digits --epochs 0 --recipe {recipe} --output {run}"
    answer = ricciq(*line.split(), *flags)
    assert answer.code == 0, answer.err
    answer = ricciq("eval", run, "--data", "digits", *flags)
    assert answer.code == 0, answer.err
    assert no_socket == []


LINES = [
    "quantize test_resnet.r160_in1k --data digits",
    f"quantize {BY_ADDRESS} --data digits",
    "quantize digits_resnet8 --data hfds/ricciq/no-such-set",
    "compare test_resnet.r160_in1k --data digits --methods ste,ricci --seeds 2",
    "eval {here} --data hfds/ricciq/no-such-set",
    "predict test_resnet.r160_in1k image.png",
]
GUARDED = """
import os, shlex, socket, sys
import sklearn.datasets, torchvision  # whatever does not import huggingface_hub

def refuse(*arguments, **_):
    print("asked for", arguments)
    sys.exit("the network was asked for")

socket.socket.connect = socket.getaddrinfo = refuse
from ricciq.cli import main

for line in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        main(shlex.split(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_what_would_be_downloaded_is_refused_at_once(tmp_path: Path, finished_run: Path) -> None:
    """In processes of their own, since libraries look at the switch when they are imported."""
    lines = [line.format(here=shlex.quote(str(finished_run))) + " --offline" for line in LINES]
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "TORCH_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, *lines],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines() == ["3"] * len(lines), done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("ricciq: ")]
    assert len(sentences) == len(lines)
    for sentence in sentences:
        assert "would be downloaded" in sentence
        assert "--offline" in sentence


def test_weights_by_address_are_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_socket: list[Any]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    forbid_network()
    with pytest.raises(ModelError, match="would be downloaded"):
        loaded(BY_ADDRESS)
    model = load_model(
        BY_ADDRESS, num_classes=None, channels=3, checkpoint=None, pretrained=False, seed=0
    ).model
    config: Any = model.pretrained_cfg
    cached = tmp_path / "hub" / "checkpoints" / config["url"].rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(model.state_dict(), cached)
    assert loaded(BY_ADDRESS) is not None
    assert no_socket == []


def loaded(name: str) -> models.LoadedModel:
    return load_model(name, num_classes=None, channels=3, checkpoint=None, pretrained=True)


def test_weights_of_the_hub_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("outgoing traffic has been disabled")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    forbid_network()
    with pytest.raises(ModelError, match="would be downloaded, which --offline or HF_HUB_OFFLINE"):
        loaded("test_resnet.r160_in1k")


def test_weights_of_the_hub_that_are_there_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(
        "test_resnet", num_classes=None, channels=3, checkpoint=None, pretrained=False
    ).model
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_, **__: model.state_dict()
    )
    forbid_network()
    assert loaded("test_resnet.r160_in1k").messages == []


def test_a_data_set_in_a_folder_is_no_download(tmp_path: Path) -> None:
    forbid_network()
    with pytest.raises(DataError, match="cannot be loaded"):
        open_source(f"hfds/{tmp_path}", tmp_path / "cache")


@pytest.mark.parametrize(("value", "forbidden"), [("1", True), ("yes", True), ("0", False)])
def test_the_switch_is_that_of_hugging_face(
    monkeypatch: pytest.MonkeyPatch, value: str, forbidden: bool
) -> None:
    monkeypatch.setenv(SWITCH, value)
    assert is_network_forbidden() is forbidden


def test_onnxruntime_never_reports() -> None:
    code = "import os, ricciq; ricciq.evaluate; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    given = {**os.environ, TELEMETRY: "0"}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, check=True)
    assert done.stdout.split() == [b"1"]
