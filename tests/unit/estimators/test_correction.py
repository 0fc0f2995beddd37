"""The correction of the gradients of activations, by hand."""

import math

import pytest
import torch
from torch import nn

from ricciq.estimators.apply import ActivationCorrection
from ricciq.estimators.metric_flow import MetricFlow
from ricciq.estimators.registry import METHODS
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.fake_quantize import SLOPE_SAMPLES, fake_quantize
from ricciq.quant.grid import UniformGrid


def quantizer(bits=2, scale=0.5, zero_point=0):
    made = ActivationQuantizer(bits)
    made.set_range(scale, zero_point)
    return made


class Net(nn.Module):
    """Gives its input quantized, and a multiple of it that is not."""

    def __init__(self, beside=0.0):
        super().__init__()
        self.quantizer = quantizer()
        self.beside = beside

    def forward(self, x):
        return self.quantizer(x), self.beside * x


X = torch.tensor([[0.6, 0.9, -0.2, 9.0], [0.5, 1.0, 0.0, 1.5]])
UPSTREAM = torch.tensor([[1.0, -2.0, 5.0, 5.0], [1.0, 2.0, 3.0, 4.0]])


def gradient(net, x=X):
    x = x.clone().requires_grad_()
    quantized, beside = net(x)
    ((quantized * UPSTREAM).sum() + beside.sum()).backward()
    return x.grad


def test_values_out_of_range_are_masked_and_values_at_a_level_have_no_residual():
    residual, mask = quantizer().residual(X)
    expected = [[0.4, -0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(residual, torch.tensor(expected))
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


def test_codes_count_from_the_zero_point():
    residual, mask = quantizer(zero_point=1).residual(X)
    torch.testing.assert_close(residual[0], torch.tensor([0.4, -0.4, -0.8, 0.0]))
    assert mask[0].tolist() == [True, True, True, False]


def test_a_projected_gradient_by_hand():
    # The first image's residual is (0.4, -0.4): along it, (1, -2) has the component (1.5, -1.5).
    net = Net()
    ActivationCorrection(net, METHODS["project"])
    expected = torch.tensor([[1.0 - 1.35, -2.0 + 1.35, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    torch.testing.assert_close(gradient(net), expected)


def test_other_uses_of_the_activations_keep_their_gradients():
    net, corrected = Net(beside=10.0), Net()
    ActivationCorrection(net, METHODS["project"])
    ActivationCorrection(corrected, METHODS["project"])
    torch.testing.assert_close(gradient(net), gradient(corrected) + 10)


def test_the_gradient_of_the_scale_is_not_corrected():
    net, plain = Net(), Net()
    ActivationCorrection(net, MetricFlow())
    gradient(net), gradient(plain)
    assert torch.equal(net.quantizer.log_scale.grad, plain.quantizer.log_scale.grad)


def test_the_estimator_is_given_the_progress():
    net = Net()
    correction = ActivationCorrection(net, METHODS["ede"])
    start = gradient(net)
    correction.progress = 1.0
    assert not torch.equal(gradient(net), start)


def test_without_gradients_the_forward_pass_is_unchanged():
    net = Net()
    ActivationCorrection(net, MetricFlow())
    quantized, _ = net(X)
    grid = net.quantizer.grid
    expected = fake_quantize(X, net.quantizer.log_scale, grid, net.quantizer.zero_point)
    assert torch.equal(quantized, expected)


# Slopes


def table(function, codes=4):
    """A quantizer's slope, from a function of the position in scales above the lowest code."""
    position = torch.arange(-SLOPE_SAMPLES, codes * SLOPE_SAMPLES + 1) / SLOPE_SAMPLES
    values = function(position)
    values[[0, -1]] = 0
    return values


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("zero_point", [0, 1])
def test_a_slope_multiplies_the_gradient_and_covers_one_scale_beyond_the_codes(layout, zero_point):
    made = quantizer(scale=0.5, zero_point=zero_point)
    made.slope = table(lambda position: position + 2)
    x = torch.tensor([-0.25, 0.0, 0.625, 1.5, 1.625, -0.75, 2.25, 1.0]).reshape(1, 2, 2, 2)
    x = x.contiguous(memory_format=layout).requires_grad_()
    upstream = torch.arange(1.0, 9.0).reshape(1, 2, 2, 2)
    made(x).backward(upstream)
    position = x.detach() / 0.5 + zero_point
    inside = (position > -1) & (position < 4)
    torch.testing.assert_close(x.grad, upstream * (position + 2) * inside)


def test_a_slope_does_not_change_the_scale_s_gradient_and_takes_huge_inputs():
    gradients = []
    for slope in (None, table(torch.ones_like)):
        log_scale = torch.zeros((), requires_grad=True)
        x = torch.tensor([-1e30, -0.3, 0.2, 2.4, 1e30], requires_grad=True)
        y = fake_quantize(x, log_scale, UniformGrid(0, 3), torch.zeros(()), slope=slope)
        y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
        assert x.grad.isfinite().all()
        gradients.append(log_scale.grad)
    assert torch.equal(*gradients)


def test_a_slope_gives_no_gradient_at_nan_and_infinity():
    made = quantizer()
    made.slope = table(torch.ones_like)
    x = torch.tensor([[math.nan, math.inf, -math.inf]], requires_grad=True)
    made(x).sum().backward()
    assert x.grad.tolist() == [[0, 0, 0]]


def test_measured_cosines_by_hand():
    net = nn.Sequential(quantizer(2), quantizer(8, scale=0.01))
    correction = ActivationCorrection(net, METHODS["ricci"])
    x = torch.tensor([[0.3, 0.5, 0.75, 1.0]], requires_grad=True)
    upstream = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    with correction.measuring() as cosines:
        net(x).backward(upstream)
    factor = net[0].slope_at(x)
    turned = torch.cosine_similarity(upstream * factor, upstream, dim=1).item()
    assert cosines[net[0]] == pytest.approx(turned, abs=1e-6)
    assert turned < 0.999
    assert cosines[net[1]] == pytest.approx(1, abs=1e-6)  # 8 bits are not corrected
    assert not net[0]._forward_hooks


def test_the_cosine_is_of_all_that_share_a_quantizer():
    shared = quantizer(2)
    correction = ActivationCorrection(nn.Sequential(shared), METHODS["ricci"])
    x = torch.tensor([[0.3, 0.5, 0.75, 1.0]], requires_grad=True)
    upstream = torch.tensor([[1.0, -2.0, 3.0, 4.0], [-5.0, 1.0, 0.0, 2.0]])
    with correction.measuring() as cosines:
        torch.stack([shared(x)[0], shared(x)[0]]).backward(upstream)
    turned = (upstream * shared.slope_at(x)).flatten()
    expected = torch.cosine_similarity(turned, upstream.flatten(), dim=0).item()
    assert cosines[shared] == pytest.approx(expected, abs=1e-6)


def test_the_cosine_of_a_million_gradients_with_themselves_is_one():
    wide = quantizer(8, scale=0.01)  # 8 bits are not corrected
    correction = ActivationCorrection(nn.Sequential(wide), METHODS["ricci"])
    x = torch.rand(4, 1_000_000, requires_grad=True)
    with correction.measuring() as cosines:
        wide(x).backward(torch.randn(x.shape))
    assert cosines[wide] == pytest.approx(1, abs=1e-6)
