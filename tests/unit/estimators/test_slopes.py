"""The slopes that estimators give to quantizers of activations."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ricciq.estimators.apply import ActivationCorrection
from ricciq.estimators.metric_flow import MetricFlow
from ricciq.estimators.projection import Projection
from ricciq.estimators.registry import METHODS
from ricciq.estimators.staircase import StaircaseFlow
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.fake_quantize import SLOPE_SAMPLES


def quantizer(bits):
    made = ActivationQuantizer(bits)
    made.set_range(0.5, 0)
    return made


def staircase(time):
    """A flow that corrects activations of any width."""
    return StaircaseFlow(time, max_codes=256)


@pytest.mark.parametrize("rule", ["natural", "pullback", "parallel"])
def test_the_slope_of_a_cell_is_the_factor_of_its_metric_with_mean_1(rule):
    flow, r = MetricFlow(block=1, rule=rule, time=0.1), torch.linspace(-1, 1, 65)
    v = torch.tanh(r)
    # Computed differently: the heat flow of tanh^2 on the circle, by a fast Fourier transform.
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
    position = torch.arange(-64, 4 * 64 + 1)
    assert (slope[(position < 0) | (position > 3 * 64)] == 0).all()
    for level in (1, 2):
        torch.testing.assert_close(slope[64 * level + 32 : 64 * level + 97][1:-1], factor[1:-1])


@pytest.mark.parametrize("codes", [2, 4, 16])
@pytest.mark.parametrize("time", [0.05, 0.25, 0.5])
def test_the_slope_of_a_staircase_is_that_of_its_mean_under_noise(codes, time):
    # The mean of round(x + noise), clamped, has the slope sum of densities at the thresholds; the
    # noise has the variance 2 t in half cells, t / 2 in scales.
    slope = staircase(time).slope(codes, 64, 0.0).double()
    position = torch.arange(-64, codes * 64 + 1, dtype=torch.float64) / 64
    spread = math.sqrt(time / 2)
    thresholds = torch.arange(codes - 1, dtype=torch.float64) + 0.5
    mean = torch.special.ndtr((position[:, None] - thresholds) / spread).sum(1)
    quotients = (mean[2:] - mean[:-2]) * 32
    assert (slope[1:-1] - quotients).abs().max() < 5e-3
    assert slope[0] == slope[-1] == 0


def test_far_from_the_ends_a_staircase_flows_to_the_straight_through_estimator():
    middle = [staircase(t).slope(64, 64, 0.0)[31 * 64 : 33 * 64] - 1 for t in (0.2, 0.4)]
    largest = [float(part.abs().max()) for part in middle]
    # Its first mode has the height 2 exp(-pi^2 t).
    assert largest[0] == pytest.approx(2 * math.exp(-(math.pi**2) * 0.2), rel=0.01)
    assert largest[0] / largest[1] == pytest.approx(math.exp(math.pi**2 * 0.2), rel=0.01)


def test_a_staircase_corrects_weights_as_its_slope_inside_a_cell():
    flow, r = staircase(0.25), torch.linspace(-1, 1, 64 + 1)
    middle = flow.slope(64, 64, 0.0)[32 * 64 + 32 : 33 * 64 + 33]
    corrected = flow.correct(torch.full((1, 65), 3.0), r[None])
    torch.testing.assert_close(corrected[0] / 3, middle, atol=1e-4, rtol=0)
    late = replace(flow, time=3.0).correct(torch.full((1, 65), 3.0), r[None])
    assert (late == 3).all()


def test_grids_of_more_than_max_codes_keep_the_straight_through_slope():
    net = nn.ModuleList([quantizer(bits) for bits in (1, 2, 3, 8)])
    ActivationCorrection(net, METHODS["ricci"])
    assert [made.slope is not None for made in net] == [True, True, False, False]
    ActivationCorrection(net, staircase(0.25))
    assert [made.slope is not None for made in net] == [True, True, True, False]


def test_the_schedule_changes_slopes_and_only_below_8_bits():
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


@pytest.mark.parametrize("changes", [{"block": 2}, {"coordinate": "weight"}])
def test_a_correction_that_depends_on_more_than_a_residual_has_no_slope(changes):
    cell = MetricFlow(block=1, rule="natural")
    assert cell.slope(4, 64, 0.5) is not None
    assert replace(cell, **changes).slope(4, 64, 0.5) is None
    assert Projection(block=1).slope(4, 64, 0.5) is None


def test_a_staircase_corrects_weights_by_the_schedule():
    falling, r = replace(METHODS["ricci"], schedule="linear"), torch.linspace(-1, 1, 9)[None]
    halfway = staircase(falling.time / 2).correct(torch.ones(1, 9), r)
    torch.testing.assert_close(falling.correct(torch.ones(1, 9), r, progress=0.5), halfway)


def test_the_slope_of_a_cell_is_finite_at_any_curvature():
    steep = MetricFlow(block=1, rule="natural", flow="none", tau_max=1e3)
    assert steep.slope(4, 64, 0.0).isfinite().all()
