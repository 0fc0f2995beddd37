"""One-dimensional convolutions: what they compute, how they train, what runtimes make of them."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from ricciq import calibrate, export_onnx, quantize
from ricciq.convert.plan import plan_conversion
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.inspection import inspect_onnx
from ricciq.estimators.apply import Correction, DiscreteWeight
from ricciq.estimators.metric_flow import MetricFlow
from ricciq.layers.conv1d import QuantConv1d


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("length", [9, 16])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
        {"kernel_size": 3, "dilation": 2, "groups": 2, "padding": 3},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 5, "groups": 4},
    ],
    ids=str,
)
def test_it_computes_the_convolution_with_discrete_weights(options, length):
    conv = nn.Conv1d(4, 8, **options)
    layer = QuantConv1d.from_float(conv, 3, 32)
    x = torch.randn(2, 4, length)
    weight = layer.weight_quantizer(conv.weight)
    assert len(weight[0].unique()) <= 8
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
    expected = F.conv1d(x, weight, conv.bias, *settings)
    torch.testing.assert_close(layer(x), expected)
    function, zeros = layer.function(), torch.zeros(8)
    bias = zeros if conv.bias is None else conv.bias
    torch.testing.assert_close(function(x, weight, bias), expected)
    assert layer.window.output_size([length]) == list(expected.shape[2:])


def test_its_gradients_are_corrected_row_by_row():
    conv = nn.Conv1d(4, 8, 3)
    layer = QuantConv1d.from_float(conv, 2, 2, nn.BatchNorm1d(8))
    layer.input_quantizer.set_range(0.5, 1)
    layer(torch.randn(2, 4, 9)).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.isfinite().all()
    assert layer.weight_quantizer.log_scale.grad.abs().min() > 0
    before = conv.weight.grad.clone()
    Correction(MetricFlow())([DiscreteWeight("layer", layer.latent, layer.weight_quantizer)])
    assert conv.weight.grad.shape == before.shape
    assert not torch.equal(conv.weight.grad, before)


def test_onnxruntime_runs_it_in_integers_with_its_norm_folded_in(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.Flatten(2),
        nn.Conv1d(8, 12, 3, 2, padding=2, groups=2, dilation=2, bias=False),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Conv1d(12, 6, 1),
        nn.SiLU(),
        nn.Conv1d(6, 6, 5, padding="same", groups=6),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    ).eval()
    pictures = torch.randn(3, 3, 12, 12)
    plan = quantize(model, pictures[:1], 4, 4)
    assert plan.kept == []
    assert [layer.norm for layer in plan.layers] == [None, "3", None, None, None]
    calibrate(model, [pictures])
    about = Preprocessing((3, 12, 12), (0.0,) * 3, (1.0,) * 3)
    inspection = inspect_onnx(export_onnx(model, tmp_path / "model.onnx", about))
    rows = {row.name: row for row in inspection.layers}
    assert all(row.fused for row in rows.values())
    assert [rows[name].shape for name in "257"] == [[12, 4, 3], [6, 12, 1], [6, 1, 5]]
    assert [rows[name].weight_bits for name in "257"] == [4, 4, 4]
    assert inspection.runtime_operators["QLinearConv"] == 4


def test_padding_with_anything_but_zeros_stays_float():
    model = nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(4, 4, 3),
    )
    plan = plan_conversion(model, torch.zeros(1, 3, 4, 4), 2, 2)
    assert [layer.name for layer in plan.layers] == ["2"]
    assert plan.kept[0].why == "circular padding has no integer kernel"


def test_efficientvim_keeps_no_convolution_in_float():
    model = timm.create_model("efficientvim_m1", pretrained=False).eval()
    plan = plan_conversion(model, torch.zeros(1, 3, 64, 64), 4, 4)
    assert not [kept for kept in plan.kept if "Conv" in kept.kind]
    names = {layer.name for layer in plan.layers}
    found = {name for name, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d)}
    assert found <= names
