"""Damping and freezing: by hand, their growth, and what they do to weights."""

import math

import pytest
import torch
from torch import nn

from ricciq.errors import RecipeError
from ricciq.estimators import ricci
from ricciq.estimators.apply import DiscreteWeight
from ricciq.quant.codebook import CodebookWeights
from ricciq.quant.weight import WeightQuantizer
from ricciq.training.oscillation import MOMENTUM, Damping, Freezing


def discrete(weight, bits=3, scale=1.0):
    weight = torch.tensor(weight, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    quantizer = WeightQuantizer(len(weight), bits)
    torch.nn.init.constant_(quantizer.log_scale, math.log(scale))
    return DiscreteWeight("layer", weight, quantizer)


def test_a_moving_codebook_cannot_be_frozen():
    weight = torch.randn(2, 8)
    item = DiscreteWeight("layer", weight, CodebookWeights(2, 2))
    with pytest.raises(RecipeError, match="weights of layer, whose codebook moves; take damping"):
        Freezing([item], 0.02)


def test_damping_by_hand():
    # Levels 2, 0 and -2 in steps of 2; 9 lies above the highest, 6, and is let be.
    item = discrete([[2.5, -0.25, -2.0, 9.0]], scale=2.0)
    Damping(0.1)([item], progress=1.0)
    torch.testing.assert_close(item.weight.grad, torch.tensor([[0.1, -0.05, 0.0, 0.0]]))


@pytest.mark.parametrize("bits", [1, 2, 4, "ternary"])
def test_the_gradient_is_that_of_the_penalty(bits):
    torch.manual_seed(0)
    item = discrete(torch.randn(3, 8).tolist(), bits, scale=0.7)
    weight = item.weight.detach().clone().requires_grad_()
    _, inside = item.quantizer.residual(weight)
    level = item.quantizer.codes(weight) * item.quantizer.scale[:, None]
    ((weight - level) * inside).square().sum().backward()
    torch.testing.assert_close(Damping(1.0).gradient(item), weight.grad)


def test_the_geometric_gradient_is_that_of_the_divergence():
    torch.manual_seed(0)
    item = discrete(torch.randn(3, 8).tolist(), scale=0.5)
    residual, _ = item.quantizer.residual(item.weight.detach())
    residual.requires_grad_()
    each = residual.unsqueeze(-1)
    curvature = ricci.tau(each)
    half = 0.25  # of a cell
    distance = ricci.divergence(torch.zeros_like(each), each, curvature).sum()
    (2 * half**2 * distance).backward()
    torch.testing.assert_close(Damping(1.0, "lne").gradient(item), residual.grad / half)


def test_both_forms_are_one_for_small_residuals():
    item = discrete([[1.001, 0.0, -1.002]])
    torch.testing.assert_close(
        Damping(1.0, "lne").gradient(item), Damping(1.0).gradient(item), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_damping_grows_along_half_a_cosine(progress, share):
    item = discrete([[1.25]])
    Damping(0.2)([item], progress)
    assert item.weight.grad.item() == pytest.approx(0.2 * share * 0.5, rel=1e-6)


def test_damped_weights_come_to_their_levels():
    item = discrete([[1.4, -0.4, 2.2]])
    for _ in range(50):
        item.weight.grad.zero_()
        Damping(1.0)([item], progress=1.0)
        item.weight.data -= 0.1 * item.weight.grad
    torch.testing.assert_close(item.weight.data, torch.tensor([[1.0, 0.0, 2.0]]), atol=1e-4, rtol=0)


def test_without_strength_or_gradient_nothing_happens():
    item = discrete([[1.25]])
    Damping(0.0)([item], progress=1.0)
    assert item.weight.grad.item() == 0
    item.weight.grad = None
    Damping(1.0)([item], progress=1.0)
    assert item.weight.grad is None


def drive(freezing, item, values, progress=1.0):
    """Set the weights to each row of values in turn, as an optimizer would; where they end up."""
    for value in values:
        item.weight.data = torch.tensor([value])
        freezing(progress)
    return item.weight.data[0].tolist()


def test_a_weight_that_oscillates_is_frozen_at_its_usual_code():
    # The first is at code 1 twice as often as at 2, the second moves on and on, the third rests.
    item = discrete([[1.2, -3.9, 0.3]], scale=1.0)
    freezing = Freezing([item], threshold=0.3)
    values = [[1.6 if n % 3 == 2 else 1.4, -3.9 + n / 50, 0.3] for n in range(150)]
    end = drive(freezing, item, values)
    assert end[0] == 1.0
    assert end[1:] == pytest.approx(values[-1][1:])
    assert freezing.frozen0.tolist() == [[True, False, False]]
    assert drive(freezing, item, [[-3.0, 2.0, 0.3]]) == pytest.approx([1.0, 2.0, 0.3])


def test_the_frequency_is_a_moving_average_of_turns():
    item = discrete([[0.4]])
    freezing = Freezing([item], threshold=0.9)
    drive(freezing, item, [[0.6], [0.4], [0.4], [0.6]])  # up; down, a turn; rest; up, a turn
    expected = (MOMENTUM * (1 - MOMENTUM)) * (1 - MOMENTUM) + MOMENTUM
    assert freezing.frequency0.item() == pytest.approx(expected)


def test_nothing_freezes_at_the_start_of_training():
    item = discrete([[0.4]])
    freezing = Freezing([item], threshold=0.001)
    turns = [[0.6], [0.4]] * 200
    assert drive(freezing, item, turns, progress=0.0) == pytest.approx([0.4])
    assert drive(freezing, item, turns, progress=1.0)[0] in (0.0, 1.0)


def test_without_a_threshold_nothing_is_kept():
    item = discrete([[0.4]])
    freezing = Freezing([item], threshold=None)
    assert drive(freezing, item, [[0.6], [0.4]] * 200) == pytest.approx([0.4])
    assert not freezing.state_dict()


def test_standardized_weights_cannot_be_frozen():
    item = discrete([[0.4]])
    item.quantizer.standardize = nn.Tanh()
    with pytest.raises(RecipeError, match=r"0\.01 cannot fix the weights of layer, .*take damping"):
        Freezing([item], threshold=0.01)
