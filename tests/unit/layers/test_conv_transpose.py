"""Transposed convolutions: rows of output channels, how they train, and what a file holds."""

import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ricciq import calibrate, export_onnx, quantize
from ricciq.convert.plan import plan_conversion
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.inspection import inspect_onnx
from ricciq.deploy.modules import deploy
from ricciq.estimators.apply import Correction, DiscreteWeight
from ricciq.estimators.metric_flow import MetricFlow
from ricciq.layers.conv_transpose import QuantConvTranspose2d, swap_channels

OPTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "bias": False},
    {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 3), "output_padding": (0, 2)},
    {"kernel_size": 3, "groups": 2, "stride": 2},
    {"kernel_size": 2, "groups": 4, "dilation": 2, "bias": False},
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_swapping_channels_gives_a_row_for_each_output_channel(groups):
    conv = nn.ConvTranspose2d(4, 8, 3, groups=groups)
    rows = swap_channels(conv.weight, groups)
    assert rows.shape == (8, 4 // groups, 3, 3)
    assert torch.equal(swap_channels(rows, groups), conv.weight)
    x = torch.randn(1, 4, 5, 5)
    before = conv(x)
    for channel in range(8):
        changed = rows.clone()
        changed[channel] = 0
        conv.weight.data = swap_channels(changed, groups)
        differs = (conv(x) != before).flatten(2).any(2).squeeze(0)
        assert differs.nonzero().flatten().tolist() == [channel]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_computes_the_convolution_with_discrete_weights(options):
    conv = nn.ConvTranspose2d(4, 8, **options)
    layer = QuantConvTranspose2d.from_float(conv, 3, 32)
    x = torch.randn(2, 4, 5, 6)
    rows = layer.weight_quantizer(layer.weight)
    assert all(len(row.unique()) <= 8 for row in rows)
    weight = swap_channels(rows, conv.groups)
    settings = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    expected = F.conv_transpose2d(x, weight, conv.bias, *settings)
    torch.testing.assert_close(layer(x), expected)
    assert layer.function().output_size(x.shape[2:]) == list(expected.shape[2:])
    finest = QuantConvTranspose2d.from_float(conv, 8, 32)
    assert (finest(x) - conv(x)).abs().mean() < 0.01 * conv(x).std()


@pytest.mark.parametrize("groups", [1, 4])
def test_its_gradients_are_corrected_row_by_row(groups):
    conv = nn.ConvTranspose2d(4, 8, 3, groups=groups)
    layer = QuantConvTranspose2d.from_float(conv, 2, 2, nn.BatchNorm2d(8))
    layer.input_quantizer.set_range(0.5, 1)
    layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.isfinite().all()
    assert layer.weight_quantizer.log_scale.grad.shape == (8,)
    before = layer.weight.grad.clone()
    assert before.abs().sum() > 0
    Correction(MetricFlow())([DiscreteWeight("layer", layer.latent, layer.weight_quantizer)])
    assert layer.weight.grad.shape == before.shape
    assert not torch.equal(layer.weight.grad, before)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 12, 3, 2, 1, 1, groups=2, dilation=2, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 6, (3, 2), (2, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    ).eval()


def test_its_codes_are_packed_and_its_kernel_is_listed_as_float(tmp_path):
    model, pictures = net(), torch.randn(3, 3, 12, 12)
    model[4].weight.data[::2] *= -1
    plan = quantize(model, pictures[:1], 4, 4)
    assert [layer.norm for layer in plan.layers] == ["1", "4", None, None]
    listed = {kept.name: (kept.kind, kept.why) for kept in plan.kept}
    assert listed == dict.fromkeys("36", ("kernel", QuantConvTranspose2d.float_kernel))
    assert not model[3].integer_weights().flip.any()
    calibrate(model, [pictures])
    about = Preprocessing((3, 12, 12), (0.0,) * 3, (1.0,) * 3)
    path = export_onnx(model, tmp_path / "model.onnx", about)
    rows = {row.name: row for row in inspect_onnx(path).layers}
    for name, numbers in (("3", 8 * 6 * 9), ("6", 12 * 6 * 6)):
        layer, channels = rows[name], len(model[int(name)].weight)
        assert (layer.operator, layer.weight_bits, layer.act_bits) == ("ConvTranspose", 4, 4)
        assert not layer.fused
        shapes = 128  # of the operators that put unpacked codes in order
        assert numbers / 2 <= layer.bytes <= numbers / 2 + 8 * channels + shapes
    assert rows["6"].shape == [12, 6, 3, 2]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options)
    (logits,) = session.run(None, {"input": pictures.numpy()})
    torch.testing.assert_close(torch.tensor(logits), deploy(model)(pictures))


def test_a_weight_that_two_layers_share_stays_float():
    model = nn.Sequential(*(nn.ConvTranspose2d(3, 3, 2) for _ in range(3)), nn.Conv2d(3, 3, 1))
    model[0].weight = model[2].weight
    plan = plan_conversion(model, torch.zeros(1, 3, 4, 4), 2, 2)
    assert [layer.name for layer in plan.layers] == ["1", "3"]
    reasons = [kept.why for kept in plan.kept if kept.name in ("0", "2")]
    assert reasons == ["another module has its weight, too"] * 2


def test_a_subclass_stays_float():
    class Changed(nn.ConvTranspose2d):
        def forward(self, x):
            return super().forward(2 * x)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Changed(3, 3, 2))
    plan = plan_conversion(model, torch.zeros(1, 3, 4, 4), 2, 2)
    assert [layer.name for layer in plan.layers] == ["0"]
