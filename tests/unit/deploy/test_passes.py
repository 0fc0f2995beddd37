"""The passes over the exported graph: nothing is left between a kernel and its quantizer."""

from collections import Counter, OrderedDict
from pathlib import Path

import onnx
import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.convert.rewrite import quantize
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy import export
from ricciq.deploy.export import export_onnx
from ricciq.deploy.inspection import inspect_onnx
from ricciq.deploy.modules import deploy
from ricciq.deploy.session import open_session, session_predictor
from ricciq.quant.calibration import calibrate

SIZE = (3, 15, 15)


class Awkward(nn.Module):
    """timm's padding and standardization, clipped rectifiers, and a weight that is only read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2dSame(3, 8, 3, 2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU6()
        self.depthwise = ScaledStdConv2dSame(8, 8, 3, 2, groups=8)
        self.act2 = nn.Hardtanh(-1.0, 2.0)
        self.point = nn.Conv2d(8, 8, 1)
        self.act3 = nn.ReLU6()
        self.attn = Reading()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(3 * self.norm(self.stem(x)))
        x = self.act3(self.point(self.act2(self.depthwise(x))) + 3)
        return self.head(self.attn(x.flatten(2).transpose(1, 2)).mean(1))


class Reading(nn.Module):
    """Hands the weight of a layer to the function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8, bias=False)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.bias)


@pytest.fixture(scope="module")
def preprocessing(tiny_preprocessing: Preprocessing) -> Preprocessing:
    return Preprocessing.from_dict({**tiny_preprocessing.to_dict(), "input_size": SIZE})


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return 2 * torch.randn(64, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def awkward(pictures, preprocessing, tmp_path_factory) -> tuple[nn.Module, Path]:
    """The network deployed at 4 bits, and its file."""
    torch.manual_seed(0)
    model = Awkward().eval()
    quantize(model, pictures, 4, 4)
    calibrate(model, [pictures])
    deployed = deploy(model)
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_onnx(deployed, path, preprocessing)
    return deployed, path


def predict(path: Path, pictures: Tensor, optimize: bool) -> Tensor:
    return session_predictor(open_session(path, optimize=optimize), path)(pictures)


def test_the_file_computes_what_torch_computes(awkward, pictures):
    deployed, path = awkward
    expected = deployed(pictures)
    assert expected.std(0).min() > 0
    torch.testing.assert_close(predict(path, pictures, False), expected, rtol=1e-4, atol=1e-4)
    assert (predict(path, pictures, True).argmax(1) == expected.argmax(1)).float().mean() > 0.9


def test_padding_belongs_to_the_convolution(awkward):
    nodes = onnx.load(awkward[1]).graph.node
    assert "Pad" not in {node.op_type for node in nodes}
    stem = next(node for node in nodes if node.op_type == "Conv")
    pads = next(a.ints for a in stem.attribute if a.name == "pads")
    assert list(pads) == [1, 1, 1, 1]
    depthwise = [node for node in nodes if node.op_type == "Conv"][1]
    pads = next(a.ints for a in depthwise.attribute if a.name == "pads")
    assert list(pads) == [0, 0, 1, 1]  # 8 pixels, stride 2: one more on the far side


def test_clips_before_a_quantizer_became_clips_of_its_codes(awkward):
    nodes = onnx.load(awkward[1]).graph.node
    makers = {node.output[0]: node.op_type for node in nodes}
    before_quantizers = {makers.get(n.input[0]) for n in nodes if n.op_type == "QuantizeLinear"}
    assert "Clip" not in before_quantizers
    before_clips = Counter(makers[node.input[0]] for node in nodes if node.op_type == "Clip")
    # One for each 4-bit input; the last ReLU6 stays, since its reader is a Reshape.
    assert before_clips == {"QuantizeLinear": 3, "Add": 1}


def test_every_layer_of_it_runs_in_integers(awkward):
    rows = {row.name: row for row in inspect_onnx(awkward[1]).layers}
    assert set(rows) == {"stem", "depthwise", "point", "attn.qkv", "head"}
    assert rows["depthwise"].fused
    assert rows["attn.qkv"].fused


def test_a_layer_that_two_parents_share_goes_by_one_name(preprocessing, tmp_path):
    shared = nn.Conv2d(3, 3, 3, padding=1)
    blocks = [nn.Sequential(OrderedDict(proj=shared, act=nn.ReLU())) for _ in range(2)]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(3 * 15 * 15, 2))
    plan = quantize(model, torch.zeros(1, *SIZE), 2, 2)
    path = export_onnx(model, tmp_path / "model.onnx", preprocessing)
    assert [layer.name for layer in plan.layers] == ["0.proj", "3"]
    names = [row.name for row in inspect_onnx(path).layers]
    assert names == ["0.proj", "0.proj/Conv.2", "3"]


@pytest.mark.slow
def test_a_model_too_large_for_one_file_keeps_its_tensors_beside_it(
    awkward, pictures, preprocessing, tmp_path, monkeypatch
):
    deployed, path = awkward
    monkeypatch.setattr(export, "LARGEST_FILE", 100)
    large = export_onnx(deployed, tmp_path / "large.onnx", preprocessing)
    assert {file.name for file in tmp_path.iterdir()} == {"large.onnx", "large.onnx.data"}
    onnx.checker.check_model(str(large), full_check=True)
    assert torch.equal(predict(large, pictures, True), predict(path, pictures, True))
    (tmp_path / "moved").mkdir()
    for file in ("large.onnx", "large.onnx.data"):
        (tmp_path / file).rename(tmp_path / "moved" / file)
    moved = tmp_path / "moved" / "large.onnx"
    assert torch.equal(predict(moved, pictures, True), predict(path, pictures, True))
