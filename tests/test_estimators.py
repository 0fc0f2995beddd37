"""Estimators by name, and what each does to the gradients of discrete weights."""

import math

import pytest
import torch
from torch import Tensor

from ricciq.errors import RecipeError
from ricciq.estimators import METHODS, Correction, DiscreteWeight, named_flow
from ricciq.quantizer import WeightQuantizer
from ricciq.ricci import RicciFlow

CORRECTING = ["ricci", "lne", "project"]


def discrete(weight: Tensor, gradient: Tensor, bits=3) -> DiscreteWeight:
    """A weight with a gradient, on a grid of step 1."""
    weight = weight.clone().requires_grad_()
    weight.grad = gradient.clone()
    return DiscreteWeight("layer", weight, WeightQuantizer(len(weight), bits))


@pytest.fixture
def draw():
    """A random weight that its grid partly clips, with its straight-through gradient."""

    def make(*shape: int, seed: int = 0) -> DiscreteWeight:
        generator = torch.Generator().manual_seed(seed)
        weight = 2 * torch.randn(shape, generator=generator)
        item = discrete(weight, torch.randn(shape, generator=generator))
        item.weight.grad *= item.quantizer.residual(weight)[1].view(shape)
        return item

    return make


def corrected(method: str, item: DiscreteWeight, **changes) -> Tensor:
    Correction(named_flow(method, changes))([item])
    return item.weight.grad


def test_the_methods_by_name():
    assert list(METHODS) == ["ricci", "ste", "lne", "project"]
    assert METHODS["ste"] is None
    assert METHODS["ricci"] == RicciFlow()
    assert (METHODS["lne"].flow, METHODS["lne"].correction) == ("none", "natural")
    assert METHODS["project"].correction == "project"


def test_ste_leaves_gradients_bit_for_bit(draw):
    item = draw(4, 5)
    item.weight.grad[0, :3] = torch.tensor([-0.0, math.inf, 1e-42])
    before = item.weight.grad.clone()
    after = corrected("ste", item)
    assert torch.equal(after.view(torch.int32), before.view(torch.int32))


def test_ricci_that_flows_for_no_time_leaves_gradients(draw):
    item = draw(4, 5)
    before = item.weight.grad.clone()
    assert torch.equal(corrected("ricci", item, time=0.0), before)


@pytest.mark.parametrize("method", CORRECTING)
def test_the_others_change_gradients(draw, method):
    item = draw(4, 5)
    before = item.weight.grad.clone()
    after = corrected(method, item)
    assert after.isfinite().all()
    assert not torch.allclose(after, before, rtol=1e-3)


def test_projection_by_hand():
    # Residuals in half steps: 0.5 up, none, 0.5 down; 5 lies above the grid's 3 and is masked.
    item = discrete(torch.tensor([[0.25, 1.0, -0.25, 5.0]]), torch.tensor([[2.0, 3.0, 0.0, 7.0]]))
    # The direction is (1, 0, -1, 0) / sqrt 2, along which the gradient has sqrt 2.
    expected = torch.tensor([[2 - 0.9, 3.0, 0.9, 0.0]])
    torch.testing.assert_close(corrected("project", item), expected)


def test_projection_of_the_weight_itself_by_hand():
    item = discrete(torch.tensor([[3.0, 0.0, -2.0]]), torch.tensor([[1.0, 1.0, 1.0]]))
    # Direction (3, 0, -2) / sqrt 13; the gradient has 1 / sqrt 13 along it.
    expected = torch.tensor([[1 - 3 / 13, 1.0, 1 + 2 / 13]])
    after = corrected("project", item, coordinate="weight", strength=1.0)
    torch.testing.assert_close(after, expected)


def test_projection_uses_each_rows_own_step():
    weight = torch.tensor([[0.25, 1.0], [0.25, 1.0]])
    item = discrete(weight, torch.ones(2, 2))
    with torch.no_grad():
        item.quantizer.log_scale[1] = math.log(0.5)
    # With a step of 0.5 the first weight of row 1 lies on a threshold: residual 1 (half to even).
    residual, _ = item.quantizer.residual(weight)
    assert residual.tolist() == [[0.5, 0.0], [1.0, 0.0]]
    torch.testing.assert_close(corrected("project", item)[:, 0], torch.tensor([0.1, 0.1]))


@pytest.mark.parametrize("method", CORRECTING)
@pytest.mark.parametrize("coordinate", ["residual", "weight"])
def test_masked_weights_keep_no_gradient_at_all(draw, method, coordinate):
    item = draw(8, 3, 3, 3)
    _, mask = item.quantizer.residual(item.weight.detach())
    assert 0.05 < (~mask).float().mean() < 0.5
    item.weight.grad = torch.randn(8, 3, 3, 3)
    after = corrected(method, item, coordinate=coordinate).flatten(1)
    assert (after[~mask] == 0).all()
    assert (after[mask] != 0).all()


@pytest.mark.parametrize("coordinate", ["residual", "weight"])
def test_coordinates_are_counted_in_steps(draw, coordinate):
    item, halved = draw(4, 6), draw(4, 6)
    with torch.no_grad():
        halved.weight.div_(2)
        halved.quantizer.log_scale.fill_(math.log(0.5))
    # The bound on tau is low enough to hold: otherwise tau makes up for any factor.
    expected = corrected("lne", item, coordinate=coordinate, tau_max=0.1)
    actual = corrected("lne", halved, coordinate=coordinate, tau_max=0.1)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("method", CORRECTING)
def test_a_convolution_is_treated_as_rows(draw, method):
    conv = draw(4, 3, 3, 3)
    flat = discrete(conv.weight.detach().flatten(1), conv.weight.grad.flatten(1))
    assert torch.equal(corrected(method, conv).flatten(1), corrected(method, flat))


def test_a_kernel_is_one_input_channel(draw):
    conv = draw(4, 3, 3, 3)
    flat = discrete(conv.weight.detach().flatten(1), conv.weight.grad.flatten(1))
    by_kernel = corrected("ricci", conv, block="kernel").flatten(1)
    assert torch.equal(by_kernel, corrected("ricci", flat, block=9))
    linear = draw(4, 6)
    before = linear.weight.grad.clone()
    single = discrete(linear.weight.detach(), before)
    assert torch.equal(
        corrected("ricci", linear, block="kernel"), corrected("ricci", single, block=1)
    )


def test_rows_and_layers_do_not_mix(draw):
    alone, first, second = draw(4, 6), draw(4, 6), draw(4, 6, seed=1)
    Correction(METHODS["ricci"])([first, second])
    assert torch.equal(first.weight.grad, corrected("ricci", alone))
    row = discrete(draw(4, 6).weight.detach()[2:3], draw(4, 6).weight.grad[2:3])
    torch.testing.assert_close(corrected("ricci", row)[0], first.weight.grad[2])


def test_a_weight_without_gradient_is_passed_over(draw):
    item = draw(4, 6)
    item.weight.grad = None
    Correction(METHODS["ricci"])([item])
    assert item.weight.grad is None
    assert Correction(METHODS["ricci"]).measure([item]) == {}


def test_changes_are_applied():
    flow = named_flow("lne", {"time": 0.5, "block": "kernel", "tau_max": 2.0})
    assert flow == RicciFlow(
        flow="none", correction="natural", time=0.5, block="kernel", tau_max=2.0
    )
    assert named_flow("ricci", {}) is METHODS["ricci"]
    assert named_flow("ste", {}) is None


@pytest.mark.parametrize(
    "changes",
    [{"rho": 1.0}, {"time": -1.0}, {"flow": "heat"}, {"block": 0}, {"tau_max": 0}, {"speed": 1}],
)
def test_values_that_do_not_hold_are_refused(changes):
    with pytest.raises(RecipeError, match=f"method ricci does not hold: .*{next(iter(changes))}"):
        named_flow("ricci", changes)


def test_ste_has_nothing_to_change():
    with pytest.raises(RecipeError, match="method ste has no time, rho; remove it"):
        named_flow("ste", {"time": 0.1, "rho": 0.5})


@pytest.mark.parametrize("method", METHODS)
def test_measuring_changes_nothing_and_gives_finite_numbers(draw, method):
    item = draw(4, 3, 3, 3)
    before = item.weight.grad.clone()
    geometry = Correction(METHODS[method]).measure([item])["layer"]
    assert torch.equal(item.weight.grad, before)
    assert all(math.isfinite(value) for value in geometry)
    assert geometry.perturbation_start > 0
    if method == "ste":
        assert geometry.mismatch_cosine == pytest.approx(1, abs=1e-6)
    else:
        after = corrected(method, item)
        cosine = torch.cosine_similarity(before.flatten(), after.flatten(), dim=0)
        assert geometry.mismatch_cosine == pytest.approx(cosine.item(), abs=1e-5)
        assert geometry.mismatch_cosine < 0.9999
