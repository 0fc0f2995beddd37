"""Corrections of rows of weights: rules, blocks, masks, dtypes, and the measured geometry."""

import math

import pytest
import torch
from test_ricci import close, dense, direction, flowed, off_diagonal, sample, seeds, times

from ricciq.estimators import ricci
from ricciq.estimators.catalog import Flow, MetricRule, Schedule
from ricciq.estimators.metric_flow import MetricFlow
from ricciq.estimators.projection import Projection
from ricciq.estimators.rowwise import CACHED, Rowwise

RULES: list[MetricRule] = ["natural", "pullback", "parallel"]
PROJECT = "project"
every_correction = pytest.mark.parametrize("correction", [*RULES, PROJECT])


def made(correction: str, **settings: object) -> Rowwise:
    """The estimator with a rule, or the projection with those settings that it has."""
    if correction == PROJECT:
        shared = {name: value for name, value in settings.items() if name in PROJECTIONS}
        return Projection(**shared)  # type: ignore[arg-type]
    return MetricFlow(rule=correction, **settings)  # type: ignore[arg-type]


PROJECTIONS = ("coordinate", "block", "strength")


@seeds
@pytest.mark.parametrize(
    "settings", [{"time": 0.0}, {"flow": "none"}, {"flow": "euler", "time": 0}]
)
def test_pullback_without_flow_is_the_straight_through_estimator(
    seed: int, settings: dict[str, object]
) -> None:
    gradient, xi = sample(4, 9, seed=seed), sample(4, 9, seed=seed + 100)
    assert torch.equal(MetricFlow(**settings).correct(gradient, xi), gradient)  # type: ignore[arg-type]
    t = ricci.tau(xi)
    start = ricci.lne_metric(xi, t)
    for form in (ricci.flow_linear(xi, t, 0.0), ricci.flow_euler(xi, t, 0.0)):
        close(ricci.pullback(form, start, gradient), gradient)


@seeds
def test_pullback_departs_from_the_gradient_continuously(seed: int) -> None:
    gradient, xi = sample(4, 9, seed=seed), 0.9 * sample(4, 9, seed=seed + 100)
    change = [
        (MetricFlow(time=time).correct(gradient, xi) - gradient).norm().item()
        for time in (1e-6, 1e-3, 0.1)
    ]
    assert 0 < change[0] < 1e-3
    assert change[0] < change[1] < change[2]


@seeds
def test_pullback_tends_to_the_start_metric_up_to_scale(seed: int) -> None:
    gradient, xi = sample(4, 12, seed=seed), sample(4, 12, seed=seed + 100)
    lowered = ricci.lne_metric(xi, ricci.tau(xi)).apply(gradient)
    late = MetricFlow(time=10.0).correct(gradient, xi)
    close(direction(late), direction(lowered))
    assert (direction(late) - direction(gradient)).norm() > 1e-2


@seeds
def test_corrections_follow_their_formulas(seed: int) -> None:
    gradient, xi = sample(4, 12, seed=seed), sample(4, 12, seed=seed + 100)
    start, end = (dense(form)[:, 0] for form in flowed(xi, time=0.05))
    expected = {
        "natural": torch.linalg.solve(end, gradient),
        "pullback": torch.linalg.solve(end, times(start, gradient)),
    }
    values, vectors = torch.linalg.eigh(start)
    root = vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT
    expected["parallel"] = times(root, gradient)
    along = direction(xi) * (direction(xi) * gradient).sum(-1, keepdim=True)
    expected["project"] = gradient - 0.6 * along
    for rule in RULES:
        close(MetricFlow(rule=rule, time=0.05).correct(gradient, xi), expected[rule])
    close(Projection(strength=0.6).correct(gradient, xi), expected["project"])


@seeds
def test_corrections_of_long_rows_act_along_the_residual(seed: int) -> None:
    gradient, xi = sample(2, 4000, seed=seed), 0.5 * sample(2, 4000, seed=seed + 100)
    unit = direction(xi)
    along = (unit * gradient).sum(-1)
    limits: list[tuple[Rowwise, float]] = [
        (MetricFlow(rule="natural", time=0.0), 1 - 1 / (1 - 0.9)),
        (MetricFlow(rule="pullback", time=0.0), 0.0),
        (MetricFlow(rule="parallel"), 1 - math.sqrt(1 - 0.9)),
        (Projection(strength=0.3), 0.3),
    ]
    for estimator, c in limits:
        change = ((gradient - estimator.correct(gradient, xi)) * unit).sum(-1)
        close(change, c * along, tol=1e-2)


@seeds
@every_correction
@pytest.mark.parametrize("flow", ["linear", "euler"])
@pytest.mark.parametrize("block", ["kernel", 5, 1, 100])
def test_blocks_are_corrected_as_rows_of_their_own(
    seed: int, correction: str, flow: Flow, block: int
) -> None:
    gradient, xi = sample(2, 23, seed=seed), 0.9 * sample(2, 23, seed=seed + 100)
    size = 9 if block == "kernel" else min(block, 23)
    whole = made(correction, flow=flow, block=block, time=0.05)
    joined = whole.correct(gradient, xi, kernel=9)
    single = made(correction, flow=flow, time=0.05)
    for first in range(0, 23, size):
        part = slice(first, first + size)
        alone = single.correct(gradient[:, part], xi[:, part])
        if correction in ("parallel", "project"):
            close(joined[:, part], alone)
        else:  # normalized over the row: equal up to one positive factor
            close(direction(joined[:, part]), direction(alone))


@seeds
@every_correction
def test_rows_do_not_affect_each_other(seed: int, correction: str) -> None:
    gradient, xi = sample(3, 17, seed=seed), 2 * sample(3, 17, seed=seed + 100)
    for coordinate in ("residual", "weight"):
        rule = made(correction, coordinate=coordinate, block=4)
        rows = [rule.correct(g[None], x[None]) for g, x in zip(gradient, xi, strict=True)]
        close(rule.correct(gradient, xi), torch.cat(rows))


@seeds
def test_the_coordinate_weight_uses_a_circle_that_contains_its_row(seed: int) -> None:
    gradient, xi = sample(3, 17, seed=seed), sample(3, 17, seed=seed + 100)
    xi = xi / xi.abs().amax(1, keepdim=True)
    unit = MetricFlow(rho=0.5, tau_max=100.0)
    stretched = MetricFlow(coordinate="weight", rho=0.5, tau_max=100.0)
    close(stretched.correct(gradient, 3 * xi), unit.correct(gradient, xi))


@seeds
@every_correction
@pytest.mark.parametrize("block", ["row", 4])
def test_masked_entries_are_unchanged_and_have_no_effect(
    seed: int, correction: str, block: int
) -> None:
    gradient, xi = sample(4, 18, seed=seed), sample(4, 18, seed=seed + 100)
    mask = sample(4, 18, seed=seed + 200) > 0
    rule = made(correction, block=block)
    clean = rule.correct(gradient * mask, xi * mask)
    assert (clean[~mask] == 0).all()
    assert (clean[mask] != 0).all()
    dirty = rule.correct(gradient, xi.where(mask, math.nan), mask=mask)
    assert torch.equal(dirty[mask], clean[mask])
    assert torch.equal(dirty[~mask], gradient[~mask])


@every_correction
@pytest.mark.parametrize("flow", ["linear", "euler", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_and_rows_of_zeros(correction: str, flow: Flow, dtype: torch.dtype) -> None:
    gradient, xi = sample(4, 30, seed=1), sample(4, 30, seed=2)
    xi[1] = 0
    gradient[2] = 0
    for block in ("row", 7, 1):
        rule = made(correction, flow=flow, block=block)
        exact = rule.correct(gradient, xi)
        out = rule.correct(gradient.to(dtype), xi.to(dtype))
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert torch.equal(out[1], gradient[1].to(dtype))
        assert (out[2] == 0).all()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), exact, rtol=100 * eps, atol=20 * eps)
    assert rule.correct(gradient, xi.to(dtype)).dtype == torch.float64


def test_a_long_float32_row_agrees_with_float64() -> None:
    gradient, xi = sample(2, 4608, seed=1), sample(2, 4608, seed=2)
    for correction in (*RULES, PROJECT):
        rule = made(correction)
        close(rule.correct(gradient.float(), xi.float()).double(), rule.correct(gradient, xi), 1e-5)


def test_correct_changes_no_argument_and_records_no_graph() -> None:
    gradient, xi = sample(2, 9, seed=1), sample(2, 9, seed=2).requires_grad_()
    kept = gradient.clone(), xi.detach().clone()
    for correction in (*RULES, PROJECT):
        assert not made(correction).correct(gradient, xi).requires_grad
    assert torch.equal(gradient, kept[0])
    assert torch.equal(xi.detach(), kept[1])


# --- measure --------------------------------------------------------------------------------------


@seeds
@pytest.mark.parametrize("block", ["row", 4])
@pytest.mark.parametrize("flow", ["linear", "euler"])
def test_measure_agrees_with_dense_geometry(seed: int, block: int, flow: Flow) -> None:
    gradient, xi = sample(3, 10, seed=seed), sample(3, 10, seed=seed + 100)
    rule = MetricFlow(block=block, flow=flow, time=0.03)
    corrected = rule.correct(gradient, xi)
    seen = rule.measure(gradient, xi, corrected)
    norms, curvature, distance = torch.zeros(3, 2).double(), 0.0, 0.0
    pieces = [xi[:, None]] if block == "row" else [xi[:, :8].reshape(3, 2, 4), xi[:, None, 8:]]
    for piece, pair in zip(pieces, rule.metrics(xi), strict=True):
        t = ricci.tau(piece)
        for side, form in enumerate(pair):
            norms[:, side] += off_diagonal(dense(form)).square().sum((1, 2, 3))
        inverse = torch.linalg.inv(dense(pair[0]))
        curvature += (inverse * dense(ricci.ricci_tensor(piece, t))).sum().item() / 3
        distance += ricci.divergence(torch.zeros_like(piece), piece, t).sum().item() / 3
    first, last = norms.sqrt().mean(0).tolist()
    flat = torch.cosine_similarity(gradient.flatten(), corrected.flatten(), dim=0).item()
    along = (direction(xi) * direction(gradient)).sum(-1).mean().item()
    expected = [first, last, last / first, curvature, distance, flat, along]
    assert list(seen) == pytest.approx(expected, rel=1e-9)
    assert seen.decay < 1
    assert seen.divergence > 0


def test_measure_of_zeros_is_finite() -> None:
    zeros = torch.zeros(2, 5)
    seen = MetricFlow().measure(zeros, zeros, zeros)
    assert seen.perturbation_start == seen.perturbation_end == seen.divergence == 0
    assert seen.decay == 1
    assert all(math.isfinite(value) for value in seen)
    tiny = torch.full((2, 5), 1e-12)
    assert MetricFlow().measure(tiny, tiny, tiny).residual_cosine == pytest.approx(1)


# --- errors ---------------------------------------------------------------------------------------


def test_bad_arguments_are_refused() -> None:
    x, rule = torch.ones(2, 4), MetricFlow(block="kernel")
    for call in (rule.correct, lambda a, b, **k: rule.measure(a, b, a, **k)):
        with pytest.raises(ValueError, match="shapes are"):
            call(x, x[:, :3])
        with pytest.raises(ValueError, match="shapes are"):
            call(x[0], x[0])
        with pytest.raises(ValueError, match="kernel is 0"):
            call(x, x, kernel=0)


def test_rows_are_corrected_alike_however_many_there_are() -> None:
    rows = 2 * CACHED // 1000 + 7
    gradient, xi = sample(rows, 1000), sample(rows, 1000, seed=1)
    whole = MetricFlow().correct(gradient, xi)
    assert torch.equal(whole[-3:], MetricFlow().correct(gradient[-3:], xi[-3:]))
    assert torch.equal(whole[:3], MetricFlow().correct(gradient[:3], xi[:3]))


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1, 1, 1]),
        ("linear", [1, 0.75, 0]),
        ("cosine", [1, 0.8535534, 0]),
        ("growing", [0, 0.25, 1]),
    ],
)
def test_the_time_follows_its_schedule(schedule: Schedule, shares: list[float]) -> None:
    gradient, xi = sample(3, 20), sample(3, 20, seed=1)
    rule = MetricFlow(schedule=schedule, time=0.2)
    for progress, share in zip([0, 0.25, 1], shares, strict=True):
        expected = MetricFlow(time=0.2 * share).correct(gradient, xi)
        close(rule.correct(gradient, xi, progress=progress), expected, tol=1e-7)


@pytest.mark.parametrize("block", ["row", "kernel", 5])
def test_the_decay_is_a_line_on_a_log_axis(block: int) -> None:
    times = [n / 50 for n in range(1, 16)]
    norms = MetricFlow(block=block).decay(sample(4, 45), times, kernel=9)
    clock, logs = torch.tensor(times).double(), torch.tensor(norms).double().log()
    slope = torch.cov(torch.stack([clock, logs]))[0, 1] / clock.var()
    assert slope.item() == pytest.approx(-2 * math.pi**2, rel=0.01)
    start = MetricFlow(block=block).measure(sample(4, 45), sample(4, 45), sample(4, 45), kernel=9)
    at_once = MetricFlow(block=block).decay(sample(4, 45), [0.0], kernel=9)
    assert at_once == pytest.approx([start.perturbation_start])
