"""First ranges: streaming histograms, the search over them, and whole models."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.errors import InputError
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.calibration import LogHistogram, calibrate, choose_range


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def counted(*batches: Tensor) -> LogHistogram:
    histogram = LogHistogram()
    for batch in batches:
        histogram(batch)
    return histogram


SAMPLES = {
    "relu": F.relu(normal(20_000)),
    "normal": normal(20_000),
    "silu": F.silu(3 * normal(20_000)),
    "shifted": normal(20_000) + 2,
    "negative": -normal(20_000).abs(),
    "heavy tails": normal(20_000) ** 3,
    "small": 1e-4 * normal(20_000),
}


# Histograms


def test_the_order_and_number_of_batches_do_not_matter():
    x = normal(6000) * 10
    reference = counted(x)
    for batches in (x.split(1), x.split(7), x.flip(0).split(1000), x.view(10, 6, 100).unbind()):
        histogram = counted(*list(batches)[:6000])
        assert torch.equal(histogram.counts, reference.counts)
        assert (histogram.low, histogram.high) == (reference.low, reference.high)
        for bits in (1, 2, 4, 8):
            assert choose_range(histogram, bits) == choose_range(reference, bits)


def test_neither_pieces_nor_the_order_in_memory_matter(monkeypatch):
    x = normal(2 * 5 * 7 * 3).view(2, 5, 7, 3)
    expected = counted(x)
    monkeypatch.setattr("ricciq.quant.fake_quantize.CACHED", 16)
    turned = x.to(memory_format=torch.channels_last)
    gaps = torch.cat([x, 9 * x], dim=1)[:, :5]
    for same in (x, turned, gaps):
        histogram = counted(same)
        assert torch.equal(histogram.counts, expected.counts)
        assert (histogram.low, histogram.high) == (expected.low, expected.high)
    assert torch.equal(x, normal(2 * 5 * 7 * 3).view(2, 5, 7, 3))


def test_memory_does_not_grow():
    histogram = LogHistogram()
    size = histogram.counts.shape
    for seed in range(20):
        histogram(normal(5000, seed) * 10.0**seed)
    assert histogram.counts.shape == size
    assert histogram.counts.numel() < 5000
    assert histogram.counts.sum() == 100_000
    held = {k: v for k, v in vars(histogram).items() if isinstance(v, Tensor | list)}
    assert list(held) == ["counts"]


def test_every_number_falls_into_a_bin_that_stands_for_it():
    x = torch.cat([2.0 ** torch.arange(-23.9, 23.9, 0.37), torch.tensor([0.3, 1.0, 7.7])])
    x = torch.cat([x, -x]).double()
    centers = LogHistogram().centers()
    for value in x:
        (used,) = counted(value.view(1)).counts.nonzero()[0]
        assert centers[used].item() == pytest.approx(value.item(), rel=0.0115)


def test_the_extremes_are_counted():
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 2.0**-25, 1e30, -1e30])
    counts = counted(x).counts
    middle = len(counts) // 2
    assert counts[middle] == 5
    assert counts[0] == counts[-1] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite_are_refused(bad):
    with pytest.raises(InputError, match="NaN or infinite"):
        counted(torch.tensor([1.0, bad, 2.0]))


# Ranges


def squared_error(x: Tensor, bits: int, scale: float, zero_point: int) -> float:
    codes = ((x / scale).round() + zero_point).clamp(0, 2**bits - 1) - zero_point
    return float((codes * scale - x).square().mean())


def best_by_brute_force(x: Tensor, bits: int) -> float:
    """The least error over steps and zero points, counted on the numbers themselves."""
    span = float(x.max().clamp_min(0) - x.min().clamp_max(0))
    top = 2**bits - 1
    zero_points = range(0, top + 1, 5 if bits == 8 else 1)
    scales = span / top * torch.linspace(0.2, 1.5, 40)
    return min(squared_error(x, bits, float(s), z) for z in zero_points for s in scales)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", list(SAMPLES))
def test_the_range_is_close_to_the_best_of_all(kind, bits):
    x = SAMPLES[kind][:5000]
    found = squared_error(x, bits, *choose_range(counted(x), bits))
    assert found <= 1.1 * best_by_brute_force(x, bits)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", list(SAMPLES))
def test_every_range_is_valid_and_better_than_none(kind, bits):
    x = SAMPLES[kind]
    scale, zero_point = choose_range(counted(x), bits)
    assert scale > 0
    assert zero_point in range(2**bits)
    assert squared_error(x, bits, scale, zero_point) < float(x.square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_more_bits_are_never_worse(bits):
    for x in SAMPLES.values():
        histogram = counted(x)
        fine = squared_error(x, bits, *choose_range(histogram, bits))
        assert fine < squared_error(x, bits - 1, *choose_range(histogram, bits - 1))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_what_is_never_negative_gets_zero_point_zero(bits):
    for x in (SAMPLES["relu"], SAMPLES["normal"].abs() + 5, torch.full((9,), 3.0)):
        assert choose_range(counted(x), bits)[1] == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_never_positive_gets_the_highest_zero_point(bits):
    assert choose_range(counted(SAMPLES["negative"]), bits)[1] >= 2**bits - 3


@pytest.mark.parametrize("bits", [1, 8])
def test_a_constant_is_kept(bits):
    scale, zero_point = choose_range(counted(torch.full((5,), 3.0)), bits)
    assert squared_error(torch.tensor([3.0]), bits, scale, zero_point) < 1e-9


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_constant_zero_gives_a_usable_range(bits):
    assert choose_range(counted(torch.zeros(10)), bits) == (1.0, 0)


# Whole models


def two_quantizers() -> nn.Sequential:
    return nn.Sequential(ActivationQuantizer(4), nn.ReLU(), ActivationQuantizer(2))


def test_a_model_is_calibrated_on_float_activations():
    model = two_quantizers().train()
    x = normal(6000).view(60, 100)
    calibrate(model, x.split(20))
    first, _, second = model
    assert float(first.scale) == pytest.approx(choose_range(counted(x), 4)[0])
    assert int(first.zero_point) == choose_range(counted(x), 4)[1] > 0
    assert float(second.scale) == pytest.approx(choose_range(counted(F.relu(x)), 2)[0])
    assert int(second.zero_point) == 0
    assert first.observer is second.observer is None
    assert model.training
    assert model(x).unique().numel() <= 4


def test_the_result_does_not_depend_on_the_batches():
    x = normal(6000).view(60, 100)
    states = []
    for batches in (x.split(1), x.flip(0).split(25)):
        model = two_quantizers()
        calibrate(model, iter(batches))
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 4)]])
def test_no_picture_is_refused(batches):
    model = nn.Sequential(nn.Identity())
    with pytest.raises(InputError, match="at least one batch"):
        calibrate(model, batches)


def test_a_failure_leaves_no_observer_and_restores_the_mode():
    model = two_quantizers().train()
    with pytest.raises(InputError, match="NaN"):
        calibrate(model, [torch.ones(2, 3), torch.full((2, 3), float("nan"))])
    assert model[0].observer is model[2].observer is None
    assert model.training


def test_constant_zero_pictures_give_finite_outputs():
    model = two_quantizers()
    calibrate(model, [torch.zeros(4, 10)])
    assert model[0].scale > 0
    assert model[2].scale > 0
    assert torch.equal(model(torch.zeros(4, 10)), torch.zeros(4, 10))


def test_a_quantizer_used_twice_sees_both_inputs():
    shared = ActivationQuantizer(8)
    model = nn.Sequential(shared, nn.Threshold(10.0, 40.0), shared)
    x = normal(1000).abs().view(10, 100)
    calibrate(model, [x])
    assert float(shared.scale) == pytest.approx(40 / 255, rel=0.05)
