"""The bound on optimizer steps, by hand."""

import pytest
import torch
from torch import nn

from ricciq.estimators.apply import DiscreteWeight
from ricciq.estimators.registry import named_correction
from ricciq.estimators.step_bound import StepBound
from ricciq.quant.weight import WeightQuantizer


def layer(bits=2, standardize=None):
    weight = nn.Parameter(torch.tensor([[0.1, -0.6, 0.3], [2.2, 1.1, -0.4]]))
    quantizer = WeightQuantizer(2, bits, standardize)
    quantizer.log_scale.data = torch.tensor([0.5, 2.0]).log()
    return DiscreteWeight("layer", weight, quantizer)


GRADIENT = torch.tensor([[1.0, -2.0, 0.001], [0.1, 0.2, 0.0]])


def descent(item, bound):
    """How far weights move in a step of plain gradient descent with rate 1."""
    before = item.weight.detach().clone()
    item.weight.grad = GRADIENT.clone()
    with bound.around([item]):
        torch.optim.SGD([item.weight], lr=1.0).step()
    return before - item.weight.detach()


def test_no_weight_moves_farther_than_the_bound():
    # Half cells are 0.25 and 1.
    expected = torch.tensor([[0.025, -0.025, 0.001], [0.1, 0.1, 0.0]])
    torch.testing.assert_close(descent(layer(), StepBound(0.1)), expected)


@pytest.mark.parametrize(
    ("bound", "item"),
    [
        (StepBound(), layer()),
        (named_correction("ste", {}).step_bound, layer()),
        (StepBound(0.1), layer(bits=8)),
        (StepBound(0.1), layer(standardize=nn.Tanh())),
    ],
)
def test_without_bound_or_cells_a_step_is_not_bounded(bound, item):
    torch.testing.assert_close(descent(item, bound), GRADIENT)


def test_the_default_method_bounds_steps_and_its_setting_changes_the_bound():
    assert named_correction("ricci", {}).step_bound == StepBound(0.2)
    assert named_correction("ricci", {"trust": 0.5}).step_bound == StepBound(0.5)
    assert named_correction("lne", {}).step_bound == StepBound()
