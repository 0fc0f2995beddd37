"""The files other runtimes get: of standard form, and with the same answers there.

The answers of an old onnxruntime and of OpenVINO are compared where RICCIQ_PORTABILITY is set,
since that installs both, into environments of their own that are kept in pytest's cache.
"""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import timm
import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.convert.rewrite import quantize
from ricciq.data.open import open_data
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.export import export_onnx
from ricciq.deploy.modules import deploy
from ricciq.deploy.session import open_session, session_predictor
from ricciq.models.factory import load_model
from ricciq.quant.calibration import calibrate

pytestmark = pytest.mark.slow

ASKED = "RICCIQ_PORTABILITY"
REQUIREMENTS = {"onnxruntime 1.20.1": ["onnxruntime==1.20.1", "numpy"], "openvino": ["openvino"]}
LEAST_AGREEMENT = {"onnxruntime": 100.0, "openvino": 98.0}
"""Percent. OpenVINO's low-precision passes move codes that lie close to a rounding tie."""
# Runs in those environments: answers to all pictures in batches of 7, and to some one by one.
SCRIPT = """
import sys
import numpy as np

path, pictures, answers = sys.argv[1:]
try:
    import onnxruntime
except ImportError:
    import openvino
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    run = lambda x: model(x)[0].copy()
else:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    run = lambda x: session.run(None, {"input": x})[0]
x = np.load(pictures)
by_7 = np.concatenate([run(x[i : i + 7]) for i in range(0, len(x), 7)])
by_1 = np.concatenate([run(x[i : i + 1]) for i in range(21)])
np.savez(answers, by_7=by_7, by_1=by_1)
"""


class TinyMobileNet(nn.Module):
    """timm's depthwise blocks with ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        act: dict[str, Any] = {"act_layer": nn.ReLU6}
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.blocks = nn.Sequential(
            DepthwiseSeparableConv(16, 24, **act),
            InvertedResidual(24, 32, stride=2, exp_ratio=4.0, **act),
            InvertedResidual(32, 32, exp_ratio=4.0, **act),
        )
        self.head = nn.Linear(32 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).flatten(1))


MODELS: dict[str, tuple[Any, int | str, int]] = {
    "resnet8 W2 A2": ("digits_resnet8", 2, 2),
    "resnet8 ternary A2": ("digits_resnet8", "ternary", 2),
    "resnet8 W3 A3": ("digits_resnet8", 3, 3),
    "mobilenet W4 A8": (TinyMobileNet, 4, 8),
    "vit W4 A8": (
        partial(timm.create_model, "test_vit", in_chans=1, img_size=32, num_classes=10),
        4,
        8,
    ),
}


# tests/unit/deploy/test_export.py looks at the form of every width.
UNLIKE_RESNETS = ["mobilenet W4 A8", "vit W4 A8"]


class Exported(NamedTuple):
    """A file, and validation pictures in the size it takes."""

    path: Path
    pictures: Tensor
    targets: Tensor


def train(model: nn.Module, images: Tensor, targets: Tensor, epochs: int, lr: float) -> None:
    """Enough for logits that do not hang on the last bit."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(images[batch]), targets[batch]).backward()
            optimizer.step()
    model.eval()


@pytest.fixture(scope="session")
def exported_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Writes the file of one of the models, once a session; trained if answers are compared."""
    folder = tmp_path_factory.mktemp("portable")
    data = open_data("digits", None)
    trained = ASKED in os.environ

    @cache
    def make(name: str) -> Exported:
        source, weight_bits, act_bits = MODELS[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if isinstance(source, str):
                loaded = load_model(
                    source, num_classes=10, channels=1, checkpoint=None, pretrained=True
                )
                model, preprocessing = loaded.model, loaded.preprocessing
            else:
                model, preprocessing = source(), Preprocessing((1, 32, 32), (0.3,), (0.4,))
            (images, targets), (pictures, wanted) = (
                next(
                    iter(data.loader(s, preprocessing, batch_size=2000, workers=0, training=False))
                )
                for s in ("fit", "val")
            )
            if trained and not isinstance(source, str):
                train(model, images, targets, epochs=6, lr=2e-3)
            quantize(model.eval(), images[:2], weight_bits, act_bits)
            calibrate(model, [images[:256]])
            if trained:
                train(model, images, targets, epochs=2, lr=5e-4)
        path = folder / f"{name.replace(' ', '-')}.onnx"
        export_onnx(deploy(model), path, preprocessing)
        return Exported(path, pictures, wanted)

    return make


def answers(path: Path, pictures: Tensor) -> Tensor:
    """What the onnxruntime that is installed here answers."""
    return session_predictor(open_session(path, threads=1), path)(pictures)


@pytest.mark.parametrize("name", UNLIKE_RESNETS)
def test_a_file_is_of_a_form_that_old_runtimes_read(
    exported_model: Callable[[str], Exported], name: str
) -> None:
    model = onnx.load(exported_model(name).path)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 10
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 18}
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0
    sizes = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert isinstance(sizes[0], str)
    assert all(isinstance(size, int) for size in sizes[1:])


@pytest.mark.parametrize("name", UNLIKE_RESNETS)
def test_a_file_answers_the_same_in_any_batch(
    exported_model: Callable[[str], Exported], name: str
) -> None:
    path, pictures, _ = exported_model(name)
    together = answers(path, pictures[:21])
    for batch in (1, 7):
        alone = torch.cat([answers(path, part) for part in pictures[:21].split(batch)])
        torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3)


# Other runtimes


@pytest.fixture(scope="session", params=REQUIREMENTS)
def runtime(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """Another runtime's name, and a Python that has it installed."""
    if ASKED not in os.environ:
        pytest.skip(f"set {ASKED}=1 to install {request.param} and compare its answers")
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("portability") / request.param.replace(" ", "-")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "complete").is_file():
        venv.create(folder, clear=True, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[request.param]]
        subprocess.run(install, check=True)
        (folder / "complete").touch()
    return request.param, python


@pytest.mark.parametrize("name", MODELS)
def test_another_runtime_gives_the_same_answers(
    runtime: tuple[str, Path],
    exported_model: Callable[[str], Exported],
    name: str,
    tmp_path: Path,
) -> None:
    other, python = runtime
    path, pictures, targets = exported_model(name)
    np.save(tmp_path / "pictures.npy", pictures.numpy())
    command = [python, "-c", SCRIPT, path, tmp_path / "pictures.npy", tmp_path / "answers.npz"]
    subprocess.run(command, check=True)
    with np.load(tmp_path / "answers.npz") as found:
        by_7, by_1 = found["by_7"], found["by_1"]
    here = answers(path, pictures).numpy()
    agreement = 100 * (here.argmax(1) == by_7.argmax(1)).mean()
    top1 = [100 * (logits.argmax(1) == targets.numpy()).mean() for logits in (here, by_7)]
    print(
        f"{other}, {name}: agreement {agreement:.2f} %, top-1 {top1[1]:.2f} % (here {top1[0]:.2f} "
        f"%), largest difference of a logit {np.abs(here - by_7).max():.2g} of {here.std():.2g}"
    )
    np.testing.assert_array_equal(by_1.argmax(1), by_7[: len(by_1)].argmax(1))
    assert agreement >= LEAST_AGREEMENT[other.split()[0]]
