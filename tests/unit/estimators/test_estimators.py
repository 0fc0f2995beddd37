"""Estimators by name, and what each does to the gradients of discrete weights."""

import math

import pytest
import torch
from torch import Tensor

from ricciq.errors import RecipeError
from ricciq.estimators.apply import Correction, DiscreteWeight, override_forward
from ricciq.estimators.metric_flow import MetricFlow
from ricciq.estimators.projection import Projection
from ricciq.estimators.registry import METHODS, named_correction, named_estimator
from ricciq.estimators.staircase import StaircaseFlow
from ricciq.estimators.step_bound import StepBound
from ricciq.estimators.straight_through import StraightThrough
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.codebook import CodebookWeights
from ricciq.quant.weight import WeightQuantizer

CORRECTING = ["ricci", "ewgs", "dsq", "ede", "lne", "project"]
FLOWING = ["ricci", "lne", "project"]


def discrete(weight: Tensor, gradient: Tensor, bits=3) -> DiscreteWeight:
    """A weight with a gradient, and a quantizer with scale 1."""
    weight = weight.clone().requires_grad_()
    weight.grad = gradient.clone()
    return DiscreteWeight("layer", weight, WeightQuantizer(len(weight), bits))


@pytest.fixture
def draw():
    """A random weight, partly out of range, with its straight-through gradient."""

    def make(*shape: int, seed: int = 0) -> DiscreteWeight:
        generator = torch.Generator().manual_seed(seed)
        weight = 2 * torch.randn(shape, generator=generator)
        item = discrete(weight, torch.randn(shape, generator=generator))
        item.weight.grad *= item.quantizer.residual(weight)[1].view(shape)
        return item

    return make


def corrected(method: str, item: DiscreteWeight, **changes) -> Tensor:
    Correction(named_estimator(method, changes))([item], progress=0.5)
    return item.weight.grad


def test_the_methods_by_name():
    assert list(METHODS) == ["ricci", "ste", "ewgs", "dsq", "ede", "lne", "project", "stochastic"]
    assert METHODS["ste"] == StraightThrough()
    assert METHODS["ricci"] == StaircaseFlow(time=0.25, max_codes=4)
    assert METHODS["lne"] == MetricFlow(flow="none", rule="natural")
    assert METHODS["project"] == Projection(strength=0.9)


def test_ste_keeps_gradients_bit_for_bit(draw):
    item = draw(4, 5)
    item.weight.grad[0, :3] = torch.tensor([-0.0, math.inf, 1e-42])
    before = item.weight.grad.clone()
    after = corrected("ste", item)
    assert torch.equal(after.view(torch.int32), before.view(torch.int32))


def test_ricci_with_flow_time_0_keeps_gradients(draw):
    item = draw(4, 5)
    before = item.weight.grad.clone()
    after = corrected("ricci", item, time=0.0, block="row", correction="pullback")
    assert torch.equal(after, before)


@pytest.mark.parametrize("method", CORRECTING)
def test_the_others_change_gradients(draw, method):
    item = draw(4, 5)
    before = item.weight.grad.clone()
    after = corrected(method, item)
    assert after.isfinite().all()
    assert not torch.allclose(after, before, rtol=1e-3)


def test_projection_by_hand():
    # Residuals in half scales: 0.5 up, 0, 0.5 down; 5 lies above the largest code, 3: masked.
    item = discrete(torch.tensor([[0.25, 1.0, -0.25, 5.0]]), torch.tensor([[2.0, 3.0, 0.0, 7.0]]))
    # The direction is (1, 0, -1, 0) / sqrt 2; the gradient's component along it is sqrt 2.
    expected = torch.tensor([[2 - 0.9, 3.0, 0.9, 7.0]])
    torch.testing.assert_close(corrected("project", item), expected)


def test_projection_of_the_weight_itself_by_hand():
    item = discrete(torch.tensor([[3.0, 0.0, -2.0]]), torch.tensor([[1.0, 1.0, 1.0]]))
    # The direction is (3, 0, -2) / sqrt 13; the gradient's component along it is 1 / sqrt 13.
    expected = torch.tensor([[1 - 3 / 13, 1.0, 1 + 2 / 13]])
    after = corrected("project", item, coordinate="weight", strength=1.0)
    torch.testing.assert_close(after, expected)


# Weights a quarter of a scale above and below their level: their residuals are 1/2 and -1/2, and
# their thresholds are another quarter of a scale away.
QUARTERS = torch.tensor([[1.25, 0.75]])


def test_elementwise_scaling_by_hand():
    item = discrete(QUARTERS, torch.tensor([[2.0, 2.0]]))
    # A positive gradient moves the first back to its level, the second away from it.
    expected = torch.tensor([[2 * (1 + 0.4 * 0.25), 2 * (1 - 0.4 * 0.25)]])
    torch.testing.assert_close(corrected("ewgs", item, delta=0.4), expected)


def test_soft_quantization_by_hand():
    # With alpha = 0.2 the steepness is ln 9, tanh(ln 9 / 2) = 0.8 and tanh(ln 9 / 4) = 1/2.
    item = discrete(QUARTERS, torch.tensor([[2.0, -4.0]]))
    factor = (1 - 0.5**2) * math.log(9) / (2 * 0.8)
    torch.testing.assert_close(corrected("dsq", item), factor * torch.tensor([[2.0, -4.0]]))


def test_soft_quantization_has_a_mean_slope_of_one():
    residual = torch.linspace(-1, 1, 20001, dtype=torch.float64)[None]
    slopes = METHODS["dsq"].correct(torch.ones_like(residual), residual)
    assert torch.trapezoid(slopes, residual).item() / 2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("progress", "factor"),
    # t = 0.1, 1 and 10; the weights are half of a half scale from the threshold.
    [
        (0.0, 1 - math.tanh(0.05) ** 2),
        (0.5, 1 - math.tanh(0.5) ** 2),
        (1.0, 10 * (1 - math.tanh(5.0) ** 2)),
    ],
)
def test_error_decay_by_hand(progress, factor):
    item = discrete(QUARTERS, torch.tensor([[2.0, -4.0]]))
    Correction(METHODS["ede"])([item], progress)
    torch.testing.assert_close(item.weight.grad, factor * torch.tensor([[2.0, -4.0]]))


def test_projection_uses_the_scale_of_each_row():
    weight = torch.tensor([[0.25, 1.0], [0.25, 1.0]])
    item = discrete(weight, torch.ones(2, 2))
    with torch.no_grad():
        item.quantizer.log_scale[1] = math.log(0.5)
    # With scale 0.5 the first weight of row 1 lies on a threshold: residual 1 (half to even).
    residual, _ = item.quantizer.residual(weight)
    assert residual.tolist() == [[0.5, 0.0], [1.0, 0.0]]
    torch.testing.assert_close(corrected("project", item)[:, 0], torch.tensor([0.1, 0.1]))


@pytest.mark.parametrize("method", FLOWING)
@pytest.mark.parametrize("coordinate", ["residual", "weight"])
def test_masked_weights_keep_their_gradient(draw, method, coordinate):
    item = draw(8, 3, 3, 3)
    _, mask = item.quantizer.residual(item.weight.detach())
    assert 0.05 < (~mask).float().mean() < 0.5
    # It is 0 unless the layer standardizes its weight: then the mask applies to a later tensor.
    item.weight.grad = torch.randn(8, 3, 3, 3)
    before = item.weight.grad.flatten(1).clone()
    changes = {"correction": "pullback"} if method == "ricci" else {}
    after = corrected(method, item, coordinate=coordinate, **changes).flatten(1)
    assert torch.equal(after[~mask], before[~mask])
    assert (after[mask] != before[mask]).all()


@pytest.mark.parametrize("coordinate", ["residual", "weight"])
def test_coordinates_do_not_depend_on_the_scale(draw, coordinate):
    item, halved = draw(4, 6), draw(4, 6)
    with torch.no_grad():
        halved.weight.div_(2)
        halved.quantizer.log_scale.fill_(math.log(0.5))
    # tau_max is low enough to be reached: otherwise tau would compensate any factor.
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


def test_rows_and_layers_do_not_affect_each_other(draw):
    alone, first, second = draw(4, 6), draw(4, 6), draw(4, 6, seed=1)
    Correction(METHODS["ricci"])([first, second])
    assert torch.equal(first.weight.grad, corrected("ricci", alone))
    row = discrete(draw(4, 6).weight.detach()[2:3], draw(4, 6).weight.grad[2:3])
    torch.testing.assert_close(corrected("ricci", row)[0], first.weight.grad[2])


def test_many_weights_are_corrected_in_groups(draw, monkeypatch):
    together, apart = ([draw(4, 6, seed=seed) for seed in range(3)] for _ in range(2))
    Correction(METHODS["ricci"])(together)
    seen = []
    estimator = METHODS["ricci"]

    class Watched:
        coordinate, slope = estimator.coordinate, estimator.slope

        def correct(self, gradient, *rest):
            seen.append(len(gradient))
            return estimator.correct(gradient, *rest)

    monkeypatch.setattr("ricciq.estimators.apply.GROUP_SIZE", 40)
    Correction(Watched())(apart)
    assert seen == [8, 4]  # with 24 weights each, two layers exceed the size
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.weight.grad, other.weight.grad)


def test_a_weight_without_gradient_is_skipped(draw):
    item = draw(4, 6)
    item.weight.grad = None
    Correction(METHODS["ricci"])([item])
    assert item.weight.grad is None
    assert Correction(METHODS["ricci"]).measure([item]) == {}


def test_changes_are_applied():
    flow = named_estimator("lne", {"time": 0.5, "block": "kernel", "tau_max": 2.0})
    assert flow == MetricFlow(flow="none", rule="natural", time=0.5, block="kernel", tau_max=2.0)
    assert named_estimator("ricci", {}) == METHODS["ricci"]


def test_a_correction_has_the_target_of_the_method_unless_another_is_given():
    assert named_correction("ricci", {}) == Correction(
        METHODS["ricci"], "activations", StepBound(0.2)
    )
    assert named_correction("lne", {}) == Correction(METHODS["lne"], "weights")
    assert named_correction("lne", {}, "both") == Correction(METHODS["lne"], "both")


@pytest.mark.parametrize(
    "changes",
    [{"rho": 1.0}, {"time": -1.0}, {"flow": "heat"}, {"block": 0}, {"tau_max": 0}],
)
def test_invalid_values_are_refused(changes):
    with pytest.raises(RecipeError, match=f"method ricci is invalid: .*{next(iter(changes))}"):
        named_estimator("ricci", changes)


@pytest.mark.parametrize(("method", "key"), [("ricci", "speed"), ("ede", "alpha"), ("dsq", "rho")])
def test_a_setting_that_the_method_does_not_have_is_refused(method, key):
    with pytest.raises(RecipeError, match=f"method {method} has no {key}; remove it"):
        named_estimator(method, {key: 0.5})


def test_ste_has_no_settings():
    with pytest.raises(RecipeError, match="method ste has no time, rho; remove it"):
        named_estimator("ste", {"time": 0.1, "rho": 0.5})


@pytest.mark.parametrize("method", METHODS)
def test_measuring_changes_no_gradient_and_gives_finite_numbers(draw, method):
    item = draw(4, 3, 3, 3)
    before = item.weight.grad.clone()
    geometry = Correction(METHODS[method]).measure([item], progress=0.5)["layer"]
    assert torch.equal(item.weight.grad, before)
    assert all(math.isfinite(value) for value in geometry)
    assert geometry.perturbation_start > 0
    if isinstance(METHODS[method], StraightThrough):
        assert geometry.mismatch_cosine == pytest.approx(1, abs=1e-6)
    else:
        after = corrected(method, item)
        cosine = torch.cosine_similarity(before.flatten(), after.flatten(), dim=0)
        assert geometry.mismatch_cosine == pytest.approx(cosine.item(), abs=1e-5)
        assert geometry.mismatch_cosine < 0.99999


def test_estimators_without_a_metric_show_the_decay_of_whole_rows(draw):
    item, times = draw(4, 3, 3, 3), [0.0, 0.1]
    decay = Correction(METHODS["ste"]).decay([item], times)
    assert decay == Correction(METHODS["ricci"]).decay([item], times)
    first, last = decay["layer"]
    assert 0 < last < first / 5


# Estimators that change the forward pass

INPUTS = {1: [-0.5, 0.0, 0.9], 2: [-1.7, -0.25, 0.6], "ternary": [-0.9, 0.3, 0.75]}


def trained_mean(quantizer: WeightQuantizer | ActivationQuantizer, x: Tensor, repeats=20_000):
    """The mean of a quantizer's outputs in training, and the values among them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        many = x.repeat(repeats, 1).T.contiguous()
        outputs = quantizer(many.view(1, -1)).view_as(many)
    return outputs.detach().mean(1), outputs.unique()


@pytest.mark.parametrize("bits", INPUTS)
def test_stochastic_rounding_is_unbiased(bits):
    quantizer = WeightQuantizer(1, bits)
    quantizer.perturbation = METHODS["stochastic"].perturb
    wanted = torch.tensor(INPUTS[bits])
    mean, values = trained_mean(quantizer.train(), wanted)
    torch.testing.assert_close(mean, wanted, rtol=0, atol=0.02)  # 1 / sqrt(20,000) is 0.007
    assert set(values.tolist()) <= set(quantizer.grid.codes.tolist())
    nearest = quantizer.eval()(wanted.view(1, -1)).view(-1)
    assert torch.equal(nearest, quantizer.grid.round(wanted))


def test_stochastic_rounding_of_activations_respects_the_zero_point():
    quantizer = ActivationQuantizer(2)
    quantizer.set_range(0.5, zero_point=1)
    quantizer.perturbation = METHODS["stochastic"].perturb
    x = torch.tensor([-0.4, 0.1, 0.8, 5.0])  # 5 lies above the last level, 1
    mean, values = trained_mean(quantizer.train(), x)
    torch.testing.assert_close(mean, torch.tensor([-0.4, 0.1, 0.8, 1.0]), rtol=0, atol=0.01)
    assert values.tolist() == [-0.5, 0.0, 0.5, 1.0]


def test_a_perturbed_forward_has_the_straight_through_gradient():
    quantizer = WeightQuantizer(1, 2)
    quantizer.perturbation = lambda ratio, cell: ratio + 0.5 * cell
    weight = torch.tensor([[-3.0, -1.6, 0.2, 0.8, 1.4]], requires_grad=True)
    discrete = quantizer.train()(weight)
    assert discrete.tolist() == [[-2, -1, 1, 1, 1]]  # -1.1, 0.7, and at most the last code
    discrete.backward(torch.ones_like(weight))
    assert weight.grad.tolist() == [[0, 1, 1, 1, 0]]
    # LSQ: the code, less the ratio where it is in range; the shift has no effect on it.
    expected = (-2 + (-1 + 1.6) + (1 - 0.2) + (1 - 0.8) + 1) / math.sqrt(5)
    assert quantizer.log_scale.grad.item() == pytest.approx(expected, rel=1e-5)


def test_a_codebook_s_levels_learn_from_the_code_that_was_chosen():
    quantizer = CodebookWeights(1, 2)
    quantizer.perturbation = lambda ratio, cell: ratio + cell / 2 + 1
    weight = quantizer.scale * torch.tensor([[-64.0, -60.0]])
    taken = quantizer.train()(weight).detach() / quantizer.scale
    quantizer(weight).sum().backward()
    assert taken.flatten().tolist() == quantizer.grid.codes[[1, 1]].tolist()
    assert quantizer.levels.grad.nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize(
    ("target", "weights", "activations"),
    [("weights", True, False), ("activations", False, True), ("both", True, True)],
)
def test_the_forward_pass_is_changed_in_the_quantizers_of_the_target(target, weights, activations):
    model = torch.nn.ModuleList([WeightQuantizer(1, 2), ActivationQuantizer(2)])
    override_forward(model, Correction(METHODS["stochastic"], target))
    assert [module.perturbation is not None for module in model] == [weights, activations]


def test_other_methods_do_not_change_the_forward_pass():
    model = torch.nn.ModuleList([WeightQuantizer(1, 2), ActivationQuantizer(2)])
    for name in set(METHODS) - {"stochastic"}:
        override_forward(model, Correction(METHODS[name], "both"))
    assert [module.perturbation for module in model] == [None, None]


@pytest.mark.parametrize(
    ("method", "target", "changes", "applied"),
    [
        ("ricci", "activations", {}, False),
        ("ricci", "weights", {}, False),  # a staircase has no metric of several weights
        ("ricci", "weights", {"correction": "pullback"}, True),
        ("ricci", "both", {"correction": "natural", "flow": "euler", "block": 9}, True),
        ("ricci", "activations", {"correction": "pullback"}, False),
        ("ricci", "weights", {"correction": "pullback", "block": 1}, False),
        ("ricci", "weights", {"correction": "pullback", "time": 0.0}, False),
        ("ricci", "weights", {"correction": "parallel"}, False),
        ("lne", "weights", {}, False),
        ("project", "weights", {}, False),
        ("ste", "weights", {}, False),
        ("ewgs", "both", {}, False),
    ],
)
def test_the_flow_of_rows_is_applied_or_a_probe(method, target, changes, applied):
    assert named_correction(method, changes, target).applies_flow is applied
