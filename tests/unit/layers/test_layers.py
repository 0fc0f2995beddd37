"""Discrete layers: what they take over, what they compute, and their integer form."""

import copy

import pytest
import torch
from timm.layers import (
    Conv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.deploy.modules import deploy
from ricciq.layers.base import BIAS_LIMIT, QuantLayer
from ricciq.layers.conv import QuantConv2d
from ricciq.layers.hooks import quantize_output
from ricciq.layers.linear import QuantLinear, QuantLinearWeight
from ricciq.layers.norm import turn_negative_rows
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.config import QuantizerConfig
from ricciq.quant.grid import LARGEST_CODE

WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8, "ternary"]
# BatchNorm weights of one layer: ordinary, negative, zero, tiny of both signs, huge.
NORM_WEIGHTS = [0.8, -1.3, 0.0, 1e-12, -1e-12, 300.0]
ROWS = len(NORM_WEIGHTS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def norm_with(weights: list[float], bias_scale: float = 1.0) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(weights)).eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.normal_(norm.bias, std=bias_scale)
    norm.weight.data = torch.tensor(weights)
    return norm


def normed_conv(weight_bits, act_bits: int, bias: bool, bias_scale: float = 1.0) -> QuantConv2d:
    conv = nn.Conv2d(4, ROWS, 3, padding=1, bias=bias)
    layer = QuantConv2d.from_float(
        conv, weight_bits, act_bits, norm_with(NORM_WEIGHTS, bias_scale)
    ).eval()
    layer.norm.weight.data = torch.tensor(NORM_WEIGHTS)  # negative ones as if from training
    if layer.input_quantizer is not None:
        layer.input_quantizer.set_range(0.11, 3 if act_bits > 1 else 1)
    return layer


def from_integers(layer: QuantConv2d, x: Tensor) -> Tensor:
    """The layer as an integer kernel computes it."""
    w = layer.integer_weights()
    sign = torch.where(w.flip, -1, 1).view(-1, 1, 1, 1)
    weight = (w.codes * sign * w.stretch).double() * w.scale.double().view(-1, 1, 1, 1)
    bias = w.bias.double() if w.bias_scale is None else w.bias.double() * w.bias_scale.double()
    if layer.input_quantizer is not None:
        x = layer.input_quantizer(x)
    return F.conv2d(
        x.double(), weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )


# Taking over


def test_a_convolution_is_taken_over_as_it_is():
    conv = nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), (1, 2), groups=2, bias=True)
    norm = nn.BatchNorm2d(6)
    layer = QuantConv2d.from_float(conv, 2, 3, norm)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert layer.norm is norm
    kept = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    for name in kept:
        assert getattr(layer, name) == getattr(conv, name)
    assert layer.weight_quantizer.bits == 2
    assert layer.input_quantizer.bits == 3
    assert layer.weight_quantizer.log_scale.shape == (6,)
    assert {p.device.type for p in layer.parameters()} == {"cpu"}
    layer.input_quantizer.observer = lambda x: None  # noqa: ARG005
    assert layer(torch.randn(2, 4, 9, 9)).shape == norm(conv(torch.randn(2, 4, 9, 9))).shape


def test_a_linear_layer_is_taken_over_as_it_is():
    linear = nn.Linear(5, 7)
    layer = QuantLinear.from_float(linear, "ternary", 4)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (5, 7)
    assert layer.norm is None


@pytest.mark.parametrize("training", [True, False])
def test_missing_biases_and_the_mode_are_kept(training):
    conv, linear = nn.Conv2d(2, 3, 1, bias=False), nn.Linear(2, 3, bias=False)
    layers = [
        QuantConv2d.from_float(conv.train(training), 2, 32),
        QuantLinear.from_float(linear.train(training), 2, 32),
    ]
    for layer in layers:
        assert layer.bias is None
        assert layer.input_quantizer is None
        assert layer.training is training
        assert layer.weight_quantizer.training is training


def test_padding_by_name_and_frozen_parameters_are_kept():
    conv = nn.Conv2d(2, 3, 3, padding="same").requires_grad_(False)
    layer = QuantConv2d.from_float(conv, 8, 32)
    assert layer(torch.randn(1, 2, 5, 5)).shape == (1, 3, 5, 5)
    assert not layer.weight.requires_grad
    assert layer.weight_quantizer.log_scale.requires_grad


# Computing


def on_grid(shape: tuple[int, ...], low: int, high: int, scale: float) -> Tensor:
    return torch.randint(low, high + 1, shape) * scale


@pytest.mark.parametrize("zero_point", [0, 100])
def test_what_lies_on_the_grid_passes_a_convolution_unchanged(zero_point):
    conv = nn.Conv2d(3, 4, 3, padding=1)
    conv.weight.data = on_grid((4, 3, 3, 3), -127, 127, 0.01)
    conv.weight.data[:, 0, 0, 0] = 1.27  # every row uses its highest code
    layer = QuantConv2d.from_float(conv, 8, 8)
    layer.input_quantizer.set_range(0.05, zero_point)
    x = on_grid((2, 3, 6, 6), -zero_point, 255 - zero_point, 0.05)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-4)


def test_what_lies_on_the_grid_passes_a_linear_layer_unchanged():
    linear = nn.Linear(6, 4)
    linear.weight.data = on_grid((4, 6), -127, 127, 0.01)
    linear.weight.data[:, 0] = -1.27
    layer = QuantLinear.from_float(linear, 8, 8)
    layer.input_quantizer.set_range(0.05, 128)
    x = on_grid((2, 5, 6), -128, 127, 0.05)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-4)


def test_the_norm_stands_behind_the_convolution():
    layer = normed_conv(2, 32, bias=True)
    x = torch.randn(2, 4, 5, 5)
    weight = layer.weight_quantizer(layer.weight)
    torch.testing.assert_close(layer(x), layer.norm(F.conv2d(x, weight, layer.bias, padding=1)))


# The integer form


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act_bits", [1, 2, 8, 32])
@pytest.mark.parametrize("weight_bits", WIDTHS)
def test_folding_the_norm_changes_nothing_but_the_rounding_of_the_bias(weight_bits, act_bits, bias):
    layer = normed_conv(weight_bits, act_bits, bias)
    x = torch.randn(3, 4, 7, 7)
    folded, expected = from_integers(layer, x), layer(x).double()
    w = layer.integer_weights()
    half_a_step = torch.zeros(ROWS) if w.bias_scale is None else w.bias_scale / 2
    slack = 1e-5 * (1 + expected.abs().amax((0, 2, 3)))  # float32 in the convolution and the norm
    worst = (folded - expected).abs().amax((0, 2, 3))
    assert (worst <= half_a_step + slack).all()


@pytest.mark.parametrize("weight_bits", WIDTHS)
def test_folding_leaves_codes_of_ordinary_rows_alone_and_notes_the_sign(weight_bits):
    layer = normed_conv(weight_bits, 4, bias=True)
    w = layer.integer_weights()
    assert w.codes.dtype == torch.int8
    assert w.flip.tolist() == [weight < 0 for weight in NORM_WEIGHTS]
    codes = layer.weight_quantizer.codes(layer.weight)
    ordinary = [0, 1, 5]
    assert torch.equal(w.codes[ordinary], codes[ordinary])
    factor = layer.norm.weight / (layer.norm.running_var + layer.norm.eps).sqrt()
    expected = layer.weight_quantizer.scale * factor.abs() / w.stretch
    assert 32 < w.stretch * w.codes.abs().max() <= (127 if weight_bits == 8 else 64)
    torch.testing.assert_close(w.scale[ordinary], expected[ordinary].detach())


@pytest.mark.parametrize("bias_scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("weight_bits", WIDTHS)
def test_the_bias_fits_its_integers_and_steps_are_positive(weight_bits, bias_scale):
    layer = normed_conv(weight_bits, 2, bias=True, bias_scale=bias_scale)
    layer.input_quantizer.set_range(1e-4, 0)
    w = layer.integer_weights()
    assert w.bias.dtype == torch.int32
    assert w.bias.long().abs().max() <= BIAS_LIMIT * 1.000001
    assert w.scale.isfinite().all()
    assert (w.scale > 0).all()
    assert (w.bias_scale > 0).all()
    grid = layer.weight_quantizer.grid
    assert torch.equal(grid.round(w.codes.float()), w.codes.float())
    torch.testing.assert_close(w.bias_scale, w.scale * layer.input_quantizer.scale)
    dead = 2  # nothing but the BatchNorm's bias is left of it
    torch.testing.assert_close((w.bias * w.bias_scale)[dead], layer.norm.bias[dead].detach())


@pytest.mark.parametrize("weight_bits", [2, 8, "ternary"])
def test_a_dead_row_is_zero_codes(weight_bits):
    w = normed_conv(weight_bits, 2, bias=False).integer_weights()
    assert not w.codes[2].any()
    assert w.codes[0].any()


def test_a_norm_without_parameters_is_folded():
    norm = nn.BatchNorm2d(2, affine=False).eval()
    norm.running_mean[:] = torch.tensor([1.0, -2.0])
    norm.running_var[:] = torch.tensor([4.0, 0.25])
    layer = QuantConv2d.from_float(nn.Conv2d(3, 2, 1), 4, 8, norm).eval()
    layer.input_quantizer.set_range(0.02, 128)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(from_integers(layer, x).float(), layer(x), rtol=1e-3, atol=1e-3)


def test_a_linear_layer_rounds_its_bias_to_the_products_steps():
    layer = QuantLinear.from_float(nn.Linear(5, 3), 3, 4)
    layer.input_quantizer.set_range(0.1, 0)
    w = layer.integer_weights()
    assert not w.flip.any()
    torch.testing.assert_close(w.bias_scale, w.scale * 0.1)
    rounded = w.bias * w.bias_scale
    assert ((rounded - layer.bias).abs() <= w.bias_scale * 0.501).all()


def test_float_inputs_leave_the_bias_float():
    layer = QuantLinear.from_float(nn.Linear(5, 3), 3, 32)
    w = layer.integer_weights()
    assert w.bias_scale is None
    torch.testing.assert_close(w.bias, layer.bias.detach())


# Points


def test_a_point_quantizes_what_a_module_returns_and_survives_a_copy():
    module = nn.Sequential(nn.Identity())
    point = ActivationQuantizer(8)
    point.set_range(1.0, 0)
    quantize_output(module, point)
    x = torch.tensor([0.4, 0.6, 300.0])
    assert module(x).tolist() == [0.0, 1.0, 255.0]
    copied = copy.deepcopy(module)
    copied.output_quantizer.set_range(100.0, 0)  # its own, not the original's
    torch.testing.assert_close(copied(x), torch.tensor([0.0, 0.0, 300.0]))
    assert module(x).tolist() == [0.0, 1.0, 255.0]
    assert "output_quantizer.log_scale" in module.state_dict()


@pytest.mark.parametrize("bias", [True, False])
def test_conversion_turns_rows_around_where_the_norm_is_negative(bias):
    conv = nn.Conv2d(4, ROWS, 3, bias=bias).eval()
    norm = norm_with(NORM_WEIGHTS)
    x = torch.randn(2, 4, 7, 7)
    before, held, rows = norm(conv(x)), norm.weight, conv.weight.clone()
    turn_negative_rows(conv.weight, conv.bias, norm)
    layer = QuantConv2d.from_float(conv, 2, 32, norm)
    torch.testing.assert_close(norm(conv(x)), before)
    assert layer.norm.weight is held
    assert layer.norm.weight.tolist() == pytest.approx([abs(weight) for weight in NORM_WEIGHTS])
    assert not layer.integer_weights().flip.any()
    turned = (conv.weight == -rows).flatten(1).all(1)
    assert turned.tolist() == [weight < 0 for weight in NORM_WEIGHTS]


def test_a_dead_row_at_one_bit_keeps_its_codes_apart():
    """No code is zero there, so its weights must go on cancelling each other."""
    norm = norm_with([0.0] * 8)
    layer = QuantConv2d.from_float(nn.Conv2d(512, 8, 3, padding=1, bias=False), 1, 8, norm).eval()
    layer.input_quantizer.set_range(1 / 255, 0)
    x = torch.rand(1, 512, 8, 8)
    assert (from_integers(layer, x) - layer(x)).abs().max() < 0.01 * norm.bias.abs().max()


# timm's own layers


@pytest.mark.parametrize("size", [(7, 8), (9, 12)])
@pytest.mark.parametrize(
    "conv",
    [
        Conv2dSame(4, 6, 3, 2),
        Conv2dSame(4, 6, (2, 5), (1, 3), dilation=(2, 1), groups=2, bias=False),
        StdConv2d(4, 6, 3, 2),
        StdConv2dSame(4, 6, 3, 2),
        ScaledStdConv2d(4, 6, 3, groups=2),
        ScaledStdConv2dSame(4, 6, 3, 2, gamma=1.7),
        nn.Conv2d(4, 6, (2, 3), padding="same"),
        nn.Conv2d(4, 6, (2, 3), (2, 1), (1, 2)),
    ],
    ids=lambda conv: type(conv).__name__,
)
def test_a_layer_of_timm_keeps_its_padding_and_its_standardization(conv, size):
    if hasattr(conv, "gain"):
        nn.init.uniform_(conv.gain, -2, 2)
    x = torch.randn(2, 4, *size)
    expected = conv(x)
    layer = QuantConv2d.from_float(conv, 8, 32)
    assert layer.window.output_size(size) == list(expected.shape[2:])
    # 8-bit codes of a row are within half a step of the weight, so outputs are close.
    assert (layer(x) - expected).abs().mean() < 0.01 * expected.std()
    if hasattr(conv, "eps"):
        rows = layer.weight_quantizer.standardize(layer.weight).flatten(1)
        assert rows.mean(1).abs().max() < 1e-6
        assert (layer.weight.flatten(1).mean(1).abs() > 1e-3).any()  # what is stored is not


def test_gradients_reach_the_weight_and_the_gain_through_the_standardization():
    conv = ScaledStdConv2d(4, 6, 3)
    layer = QuantConv2d.from_float(conv, 2, 2)
    layer.input_quantizer.set_range(0.5, 1)
    layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert layer.weight_quantizer.standardize.gain is conv.gain
    assert conv.gain.grad.abs().min() > 0


def test_a_weight_that_is_lent_is_discrete_when_read():
    linear = nn.Linear(8, 5)
    layer = QuantLinearWeight.from_float(linear, 2, 4)
    assert isinstance(layer, QuantLayer)
    assert layer.latent is linear.weight
    assert len(layer.weight.unique()) <= 4 * 5
    twin = QuantLinear.from_float(linear, 2, 4)
    assert torch.equal(layer.weight, twin.weight_quantizer(twin.weight))
    layer.weight.sum().backward()
    assert linear.weight.grad is not None


def test_a_turned_row_of_a_codebook_deploys_to_the_same_numbers():
    # The ends of these codes are opposites, but not what lies between.
    layer = QuantConv2d.from_float(
        nn.Conv2d(3, 4, 3, bias=False), 2, 2, nn.BatchNorm2d(4), QuantizerConfig("codebook")
    )
    layer.weight_quantizer.levels.data = torch.tensor([-64.0, -20.0, 5.0, 64.0]) / LARGEST_CODE
    layer.input_quantizer.set_range(0.4, 0)
    layer.norm.weight.data = torch.tensor([1.0, -1.0, 0.5, -2.0])
    layer.eval()
    x = torch.rand(2, 3, 6, 6)
    torch.testing.assert_close(deploy(nn.Sequential(layer))(x), layer(x), atol=1e-4, rtol=1e-4)
