"""Damping: the penalty's gradient by hand, its growth, and what it does to weights."""

import math

import pytest
import torch

from ricciq import ricci
from ricciq.correction import DiscreteWeight
from ricciq.oscillation import Damping
from ricciq.quantizer import WeightQuantizer


def discrete(weight, bits=3, scale=1.0):
    weight = torch.tensor(weight, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    quantizer = WeightQuantizer(len(weight), bits)
    torch.nn.init.constant_(quantizer.log_scale, math.log(scale))
    return DiscreteWeight("layer", weight, quantizer)


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
