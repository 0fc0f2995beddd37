"""The correction of activation gradients and the bound on steps, by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ricciq.estimators.apply import ActivationCorrection, Correction, DiscreteWeight
from ricciq.estimators.registry import METHODS
from ricciq.estimators.ricci_flow import RicciFlow
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.fake_quantize import SLOPE_SAMPLES, fake_quantize
from ricciq.quant.grid import UniformGrid
from ricciq.quant.weight import WeightQuantizer


def staircase(time):
    return replace(METHODS["ricci"], time=time, max_codes=256)


def quantizer(bits=2, scale=0.5, zero_point=0):
    made = ActivationQuantizer(bits)
    made.set_range(scale, zero_point)
    return made


class Net(nn.Module):
    """Quantizes its input for one reader and hands it as it is to another."""

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


def test_what_lies_outside_is_masked_and_what_is_at_a_level_has_no_residual():
    residual, mask = quantizer().residual(X)
    expected = [[0.4, -0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(residual, torch.tensor(expected))
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


def test_codes_count_from_the_zero_point():
    residual, mask = quantizer(zero_point=1).residual(X)
    torch.testing.assert_close(residual[0], torch.tensor([0.4, -0.4, -0.8, 0.0]))
    assert mask[0].tolist() == [True, True, True, False]


def test_a_projected_gradient_by_hand():
    # The first picture's residual is (0.4, -0.4): of (1, -2) a share of (1.5, -1.5) goes.
    net = Net()
    ActivationCorrection(net, METHODS["project"])
    expected = torch.tensor([[1.0 - 1.35, -2.0 + 1.35, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    torch.testing.assert_close(gradient(net), expected)


def test_other_readers_of_the_activations_are_let_be():
    net, corrected = Net(beside=10.0), Net()
    ActivationCorrection(net, METHODS["project"])
    ActivationCorrection(corrected, METHODS["project"])
    torch.testing.assert_close(gradient(net), gradient(corrected) + 10)


def test_the_step_keeps_its_own_gradient():
    net, plain = Net(), Net()
    ActivationCorrection(net, RicciFlow())
    gradient(net), gradient(plain)
    assert torch.equal(net.quantizer.log_scale.grad, plain.quantizer.log_scale.grad)


def test_progress_reaches_the_estimator():
    net = Net()
    correction = ActivationCorrection(net, METHODS["ede"])
    start = gradient(net)
    correction.progress = 1.0
    assert not torch.equal(gradient(net), start)


def test_without_gradients_nothing_is_done():
    net = Net()
    ActivationCorrection(net, RicciFlow())
    quantized, _ = net(X)
    grid = net.quantizer.grid
    expected = fake_quantize(X, net.quantizer.log_scale, grid, net.quantizer.zero_point)
    assert torch.equal(quantized, expected)


# Slopes


def table(function, codes=4):
    """A slope as a quantizer wants it, by what it is at each place in steps above the lowest."""
    place = torch.arange(-SLOPE_SAMPLES, codes * SLOPE_SAMPLES + 1) / SLOPE_SAMPLES
    values = function(place)
    values[[0, -1]] = 0
    return values


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("zero_point", [0, 1])
def test_a_slope_multiplies_the_gradient_wherever_it_is_not_0(layout, zero_point):
    made = quantizer(scale=0.5, zero_point=zero_point)
    made.slope = table(lambda place: place + 2)
    x = torch.tensor([-0.25, 0.0, 0.625, 1.5, 1.625, -0.75, 2.25, 1.0]).reshape(1, 2, 2, 2)
    x = x.contiguous(memory_format=layout).requires_grad_()
    upstream = torch.arange(1.0, 9.0).reshape(1, 2, 2, 2)
    made(x).backward(upstream)
    place = x.detach() / 0.5 + zero_point
    inside = (place > -1) & (place < 4)
    torch.testing.assert_close(x.grad, upstream * (place + 2) * inside)


def test_a_slope_leaves_the_step_s_gradient_and_bears_any_number():
    gradients = []
    for slope in (None, table(torch.ones_like)):
        log_scale = torch.zeros((), requires_grad=True)
        x = torch.tensor([-1e30, -0.3, 0.2, 2.4, 1e30], requires_grad=True)
        y = fake_quantize(x, log_scale, UniformGrid(0, 3), torch.zeros(()), slope=slope)
        y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
        assert x.grad.isfinite().all()
        gradients.append(log_scale.grad)
    assert torch.equal(*gradients)


def test_a_slope_bears_nan():
    made = quantizer()
    made.slope = table(torch.ones_like)
    x = torch.tensor([[math.nan, math.inf, -math.inf]], requires_grad=True)
    made(x).sum().backward()
    assert x.grad.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("rule", ["natural", "pullback", "parallel"])
def test_the_slope_of_a_cell_is_its_metric_s_factor_and_1_on_average(rule):
    flow, r = RicciFlow(block=1, correction=rule, time=0.1), torch.linspace(-1, 1, 65)
    v = torch.tanh(r)
    # By other means: the heat flow of tanh^2 on the circle, from a fast Fourier transform.
    circle = torch.tanh(torch.linspace(-1, 1, 4097, dtype=torch.float64)[:-1]).square()
    waves = torch.fft.rfft(circle)
    waves *= torch.exp(-((math.pi * torch.arange(len(waves))) ** 2) * 0.1)
    flowed = torch.fft.irfft(waves, n=4096)[::64]
    flowed = torch.cat([flowed, flowed[:1]]).float()
    factor = {
        "natural": 1 / (1 - flowed),
        "pullback": (1 - v.square()) / (1 - flowed),
        "parallel": (1 - v.square()).sqrt(),
    }[rule]
    factor /= torch.trapezoid(factor, r) / 2
    slope = flow.slope(4, 64, 0.0)
    place = torch.arange(-64, 4 * 64 + 1)
    assert (slope[(place < 0) | (place > 3 * 64)] == 0).all()
    for level in (1, 2):
        torch.testing.assert_close(slope[64 * level + 32 : 64 * level + 97][1:-1], factor[1:-1])


@pytest.mark.parametrize("codes", [2, 4, 16])
@pytest.mark.parametrize("time", [0.05, 0.25, 0.5])
def test_the_slope_of_a_staircase_is_that_of_its_noisy_mean(codes, time):
    # The mean of round(x + noise), clamped, has the slope sum of densities at the thresholds; the
    # noise has the variance 2 t in half cells, t / 2 in steps.
    slope = staircase(time).slope(codes, 64, 0.0).double()
    place = torch.arange(-64, codes * 64 + 1, dtype=torch.float64) / 64
    spread = math.sqrt(time / 2)
    thresholds = torch.arange(codes - 1, dtype=torch.float64) + 0.5
    below = torch.special.ndtr((place[:, None] - thresholds) / spread).sum(1)  # the noisy mean
    slopes = (below[2:] - below[:-2]) * 32
    assert (slope[1:-1] - slopes).abs().max() < 5e-3  # of their difference quotient
    assert slope[0] == slope[-1] == 0


def test_far_from_the_ends_a_staircase_flows_to_the_straight_through_estimator():
    middle = [staircase(t).slope(64, 64, 0.0)[31 * 64 : 33 * 64] - 1 for t in (0.2, 0.4)]
    largest = [float(part.abs().max()) for part in middle]
    # Its first mode has the height 2 exp(-pi^2 t).
    assert largest[0] == pytest.approx(2 * math.exp(-(math.pi**2) * 0.2), rel=0.01)
    assert largest[0] / largest[1] == pytest.approx(math.exp(math.pi**2 * 0.2), rel=0.01)


def test_a_staircase_for_weights_is_the_same_inside_a_cell():
    flow, r = staircase(0.25), torch.linspace(-1, 1, 64 + 1)
    middle = flow.slope(64, 64, 0.0)[32 * 64 + 32 : 33 * 64 + 33]
    corrected = flow.correct(torch.full((1, 65), 3.0), r[None])
    torch.testing.assert_close(corrected[0] / 3, middle, atol=1e-4, rtol=0)
    late = replace(flow, time=3.0).correct(torch.full((1, 65), 3.0), r[None])
    assert (late == 3).all()


def test_finer_grids_than_asked_for_keep_the_straight_through_slope():
    net = nn.ModuleList([quantizer(bits) for bits in (1, 2, 3, 8)])
    ActivationCorrection(net, METHODS["ricci"])
    assert [made.slope is not None for made in net] == [True, True, False, False]
    ActivationCorrection(net, staircase(0.25))
    assert [made.slope is not None for made in net] == [True, True, True, False]


@pytest.mark.parametrize("codes", [1, 4.0, True])
def test_codes_that_no_grid_has_are_refused(codes):
    with pytest.raises(ValueError, match=f"max_codes is {codes}; give an integer from 2"):
        RicciFlow(max_codes=codes)


def test_the_schedule_moves_the_slope_and_only_quantizers_below_8_bits_get_it():
    net = nn.ModuleList([quantizer(2), quantizer(8)])
    falling = replace(METHODS["ricci"], schedule="linear")
    correction = ActivationCorrection(net, falling)
    torch.testing.assert_close(net[0].slope, METHODS["ricci"].slope(4, SLOPE_SAMPLES, 0.5))
    correction.advance(0.5)
    halfway = staircase(METHODS["ricci"].time / 2)
    torch.testing.assert_close(net[0].slope, halfway.slope(4, SLOPE_SAMPLES, 0.0))
    correction.advance(1.0)  # a staircase at time 0 would be zero or infinite
    assert net[0].slope.isfinite().all()
    assert net[1].slope is None


@pytest.mark.parametrize(
    "changes",
    [{"block": 2}, {"coordinate": "weight"}, {"schedule": "measured"}, {"correction": "project"}],
)
def test_what_depends_on_more_than_a_residual_has_no_slope(changes):
    cell = RicciFlow(block=1, correction="natural")
    assert cell.slope(4, 64, 0.5) is not None
    assert replace(cell, **changes).slope(4, 64, 0.5) is None


def test_a_staircase_for_weights_keeps_to_the_schedule():
    falling, r = replace(METHODS["ricci"], schedule="linear"), torch.linspace(-1, 1, 9)[None]
    halfway = staircase(falling.time / 2).correct(torch.ones(1, 9), r)
    torch.testing.assert_close(falling.correct(torch.ones(1, 9), r, progress=0.5), halfway)


@pytest.mark.parametrize(
    "changes", [{"flow": "euler"}, {"coordinate": "weight"}, {"schedule": "measured"}]
)
def test_what_a_staircase_has_not_is_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} is .*, which a staircase has not"):
        replace(METHODS["ricci"], **changes)


def test_the_slope_of_a_cell_is_finite_at_any_curvature():
    steep = RicciFlow(block=1, correction="natural", flow="none", tau_max=1e3)
    assert steep.slope(4, 64, 0.0).isfinite().all()


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
    assert cosines[net[1]] == pytest.approx(1, abs=1e-6)  # 8 bits are left alone
    assert not net[0]._forward_hooks


# Trust


def layer(bits=2, standardize=None):
    weight = nn.Parameter(torch.tensor([[0.1, -0.6, 0.3], [2.2, 1.1, -0.4]]))
    made = WeightQuantizer(2, bits, standardize)
    made.log_scale.data = torch.tensor([0.5, 2.0]).log()
    return DiscreteWeight("layer", weight, made)


GRADIENT = torch.tensor([[1.0, -2.0, 0.001], [0.1, 0.2, 0.0]])


def step(item, flow):
    """One of plain descent at rate 1: how far the weights go down their gradient."""
    before = item.weight.detach().clone()
    item.weight.grad = GRADIENT.clone()
    with Correction(flow).within_trust([item]):
        torch.optim.SGD([item.weight], lr=1.0).step()
    return before - item.weight.detach()


def test_no_step_goes_farther_than_trust():
    # Half cells are 0.25 and 1.
    expected = torch.tensor([[0.025, -0.025, 0.001], [0.1, 0.1, 0.0]])
    torch.testing.assert_close(step(layer(), RicciFlow(trust=0.1)), expected)


@pytest.mark.parametrize(
    ("flow", "item"),
    [
        (RicciFlow(), layer()),
        (METHODS["ste"], layer()),
        (RicciFlow(trust=0.1), layer(bits=8)),
        (RicciFlow(trust=0.1), layer(standardize=nn.Tanh())),
    ],
)
def test_without_bound_or_cells_a_step_goes_anywhere(flow, item):
    torch.testing.assert_close(step(item, flow), GRADIENT)


def test_a_trust_of_nothing_is_refused():
    with pytest.raises(ValueError, match="trust is 0"):
        RicciFlow(trust=0)
