"""Laws of the geometry, in float64 over several seeds."""

import math

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from ricciq.estimators import ricci
from ricciq.estimators.catalog import Flow
from ricciq.estimators.metric_flow import MetricFlow
from ricciq.estimators.ricci import Metric

SEEDS = [0, 1, 2]
seeds = pytest.mark.parametrize("seed", SEEDS)


def sample(*shape: int, seed: int = 0, low: float = -1.0) -> Tensor:
    """Uniform numbers from low to 1 in float64."""
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return low + (1 - low) * noise


def dense(form: Metric) -> Tensor:
    outer = torch.einsum("...ik,...k,...jk->...ij", form.factors, form.coefficients, form.factors)
    return torch.diag_embed(form.diag) + outer


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))


def times(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def close(actual: Tensor, expected: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def direction(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


# --- potential and divergence ---------------------------------------------------------------------


@seeds
@pytest.mark.parametrize("rho", [0.1, 0.9, 0.999])
def test_tau_bounds_sigma_and_itself(seed: int, rho: float) -> None:
    xi = sample(6, 50, seed=seed) * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]
    t = ricci.tau(xi.requires_grad_(), rho, tau_max=1.0)
    sigma = torch.tanh(t * xi).square().sum(-1)
    assert t.shape == (6, 1)
    assert not t.requires_grad
    assert (sigma <= rho).all()
    assert (t <= 1).all()
    close(t[0], torch.ones(1, dtype=torch.float64))  # short: the bound on tau itself
    close((t * xi)[-1].norm(), torch.tensor(rho, dtype=torch.float64).sqrt())  # long: that on sigma
    assert ricci.tau(torch.zeros(1, 5), tau_max=3.0).item() == 3.0


@seeds
def test_gradient_of_the_potential_is_tanh_and_its_hessian_diagonal(seed: int) -> None:
    xi, t = 3 * sample(5, seed=seed), torch.full((1,), 0.7, dtype=torch.float64)

    def phi(x: Tensor) -> Tensor:
        return ricci.potential(x, t)

    close(jacfwd(phi)(xi), torch.tanh(t * xi) / t)
    close(jacfwd(jacfwd(phi))(xi), torch.diag(1 - torch.tanh(t * xi).square()))


def test_potential_is_precise_near_and_far_from_zero() -> None:
    one = torch.ones(1, 1)
    assert ricci.potential(torch.full((1, 1), 1e-4), one).item() == pytest.approx(5e-9, rel=1e-5)
    far = ricci.potential(torch.full((1, 1), 1e3), one).item()
    assert far == pytest.approx(1e3 - math.log(2), rel=1e-6)


@seeds
def test_divergence_is_zero_at_equality_and_positive_elsewhere(seed: int) -> None:
    a, b = sample(4, 9, seed=seed), sample(4, 9, seed=seed + 100)
    t = ricci.tau(b)
    assert (ricci.divergence(a, a, t) == 0).all()
    assert (ricci.divergence(a, b, t) > 0).all()
    assert ricci.divergence(a, b, t).shape == (4,)


@seeds
def test_divergence_is_half_a_squared_length_to_second_order(seed: int) -> None:
    xi, step = sample(4, 9, seed=seed), sample(4, 9, seed=seed + 100)
    t, eps = ricci.tau(xi), 1e-4
    length = ((1 - torch.tanh(t * xi).square()) * step.square()).sum(-1)
    close(ricci.divergence(xi + eps * step, xi, t) / eps**2, length / 2, tol=1e-3)


# --- metric ---------------------------------------------------------------------------------------


@seeds
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_inverse_and_square_root_of_the_metric(seed: int, n: int) -> None:
    xi, x = sample(3, n, seed=seed), sample(3, n, seed=seed + 100)
    t = ricci.tau(xi)
    v, g = torch.tanh(t * xi), ricci.lne_metric(xi, t)
    close(g.apply(x), times(dense(g), x))
    close(dense(g), torch.eye(n, dtype=torch.float64) - v[:, :, None] * v[:, None, :])
    close(g.solve(g.apply(x)), x)
    gap = 1 - v.square().sum(-1, keepdim=True)
    close(g.solve(x), x + v * ((v * x).sum(-1, keepdim=True) / gap))  # Sherman-Morrison
    close(ricci.lne_sqrt(v, ricci.lne_sqrt(v, x)), g.apply(x))


@seeds
def test_square_root_is_smooth_through_zero(seed: int) -> None:
    x, v = sample(2, 6, seed=seed), sample(2, 6, seed=seed + 100)
    assert torch.equal(ricci.lne_sqrt(torch.zeros_like(v), x), x)
    small = 1e-4 * v
    first_order = x - small * (small * x).sum(-1, keepdim=True) / 2
    close(ricci.lne_sqrt(small, x) - x, first_order - x, tol=1e-14)


@seeds
def test_the_first_order_inverse_of_the_paper_errs_in_the_fourth_order_of_v(seed: int) -> None:
    xi, x = 0.05 * sample(1, 8, seed=seed), sample(1, 8, seed=seed + 100)
    one = torch.ones(1, 1, dtype=torch.float64)

    def error(xi: Tensor) -> float:
        v = torch.tanh(xi)
        first_order = x + v * (v * x).sum(-1, keepdim=True)
        return (ricci.lne_metric(xi, one).solve(x) - first_order).norm().item()

    assert error(xi) / error(xi / 2) == pytest.approx(16, rel=0.05)


@seeds
@pytest.mark.parametrize("rho", [0.5, 0.99])
def test_metric_is_positive_definite_exactly_under_the_condition(seed: int, rho: float) -> None:
    xi = sample(4, 12, seed=seed)
    t = ricci.tau(xi, rho)
    lowest = torch.linalg.eigvalsh(dense(ricci.lne_metric(xi, t))).amin(-1)
    assert (lowest >= 1 - rho - 1e-12).all()
    close(lowest, 1 - torch.tanh(t * xi).square().sum(-1))
    beyond = torch.linalg.eigvalsh(dense(ricci.lne_metric(xi, 4 * t))).amin(-1)
    assert (beyond < 0).all()


@seeds
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("lead", [(5,), (2, 3)])
def test_metric_methods_agree_with_dense_algebra(seed: int, k: int, lead: tuple[int, ...]) -> None:
    n = 6
    factors = 0.3 * sample(*lead, n, k, seed=seed)
    coefficients = 0.8 * sample(*lead, k, seed=seed + 1)
    form = Metric(sample(*lead, n, seed=seed + 2, low=0.5), factors, coefficients)
    x, matrix = sample(*lead, n, seed=seed + 3), dense(form)
    close(form.apply(x), times(matrix, x))
    close(form.solve(x), torch.linalg.solve(matrix, x))
    close(form.logdet(), torch.linalg.slogdet(matrix).logabsdet)
    close(form.off_diagonal_norm(), torch.linalg.matrix_norm(off_diagonal(matrix)))
    close(dense(form.scaled(torch.full((*lead, 1), 3.0, dtype=torch.float64))), 3 * matrix)


# --- curvature ------------------------------------------------------------------------------------


def christoffel_by_autodiff(xi: Tensor, t: Tensor) -> Tensor:
    """Levi-Civita connection, [k, i, j], of the metric at one point xi, (n,), with tau constant."""

    def metric(x: Tensor) -> Tensor:
        v = torch.tanh(t * x)
        return torch.eye(len(x), dtype=x.dtype) - torch.outer(v, v)

    slope = jacfwd(metric)(xi)  # [i, j, l]: derivative of g_ij along l
    lowered = (
        torch.einsum("jli->lij", slope)
        + torch.einsum("ilj->lij", slope)
        - torch.einsum("ijl->lij", slope)
    ) / 2
    return torch.einsum("kl,lij->kij", torch.linalg.inv(metric(xi)), lowered)


def ricci_by_autodiff(xi: Tensor, t: Tensor) -> Tensor:
    gamma = christoffel_by_autodiff(xi, t)
    slope = jacfwd(christoffel_by_autodiff)(xi, t)  # [k, i, j, l]
    return (
        torch.einsum("kijk->ij", slope)
        - torch.einsum("kikj->ij", slope)
        + torch.einsum("kkl,lij->ij", gamma, gamma)
        - torch.einsum("kjl,lik->ij", gamma, gamma)
    )


@seeds
@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_curvature_equals_automatic_differentiation(seed: int, n: int) -> None:
    xi = sample(3, n, seed=seed)
    t = ricci.tau(xi)
    expected = vmap(ricci_by_autodiff)(xi, t)
    form = ricci.ricci_tensor(xi, t)
    close(dense(form), expected, tol=1e-10)
    inverse = torch.linalg.inv(dense(ricci.lne_metric(xi, t)))
    trace = (inverse * expected).sum((-1, -2))
    close(ricci.scalar_curvature(xi, t), trace, tol=1e-10)


@seeds
def test_one_coordinate_is_flat_and_more_curve_negatively(seed: int) -> None:
    for n in (1, 5):
        xi = sample(4, n, seed=seed)
        t = ricci.tau(xi)
        highest = torch.linalg.eigvalsh(dense(ricci.ricci_tensor(xi, t))).amax(-1)
        scalar = ricci.scalar_curvature(xi, t)
        if n == 1:
            close(highest, torch.zeros_like(highest))
            close(scalar, torch.zeros_like(scalar))
        else:
            assert (highest < 0).all()
            assert (scalar < 0).all()


# --- flow -----------------------------------------------------------------------------------------


def flowed(xi: Tensor, **settings: object) -> tuple[Metric, Metric]:
    """g(0) and the normalized g(t) of rows that are one block each."""
    [pair] = MetricFlow(rule="natural", **settings).metrics(xi)  # type: ignore[arg-type]
    return pair


@seeds
@pytest.mark.parametrize("n", [1, 2, 3, 20])
@pytest.mark.parametrize("time", [0.01, 1.0, 100.0])
def test_euler_step_is_positive_definite_and_does_not_perturb(
    seed: int, n: int, time: float
) -> None:
    xi = sample(4, n, seed=seed)
    start, end = flowed(xi, flow="euler", time=time)
    assert (torch.linalg.eigvalsh(dense(end)) > 0).all()
    t = ricci.tau(xi)
    raw = dense(start)[:, 0] - 2 * time * dense(ricci.ricci_tensor(xi, t))
    close(dense(ricci.flow_euler(xi, t, time)), raw)
    before, after = start.off_diagonal_norm(), end.off_diagonal_norm()
    if n <= 2:  # flat, or conformal to itself
        close(dense(end), dense(start), tol=1e-9)
    else:
        assert (after < before).all()


@seeds
@pytest.mark.parametrize("rho", [0.9, 0.99])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_linear_flow_is_positive_definite(seed: int, rho: float, n: int) -> None:
    xi = sample(8, n, seed=seed)
    for time in (1e-4, 1e-3, 0.02, 0.1, 1.0, 1e30):
        _, end = flowed(xi, flow="linear", time=time, rho=rho)
        assert (torch.linalg.eigvalsh(dense(end)) > 0).all()


def heat_by_brute_force(values: Tensor, s: Tensor, r: Tensor, time: float) -> Tensor:
    """Simpson's rule for the heat kernel of the circle [-1, 1], summed over its images."""
    images = 2.0 * torch.arange(-4, 5, dtype=torch.float64)
    distance = r[:, None, None] - s[:, None] + images
    kernel = torch.exp(-distance.square() / (4 * time)).sum(-1) / math.sqrt(4 * math.pi * time)
    simpson = torch.full_like(s, 2.0)
    simpson[1::2] = 4.0
    simpson[[0, -1]] = 1.0
    return (kernel * values * simpson).sum(-1) * (s[1] - s[0]) / 3


@pytest.mark.parametrize("curvature", [0.05, 1.0, 4.0])
@pytest.mark.parametrize(
    ("time", "tol"),
    [(1e-4, 1e-4), (1e-3, 5e-6), (0.005, 1e-8), (0.0126, 1e-10), (0.0128, 1e-10), (0.1, 1e-10)],
)
def test_linear_flow_solves_the_heat_equation(curvature: float, time: float, tol: float) -> None:
    r = torch.cat([torch.linspace(-1, 1, 41), torch.tensor([-0.999, 0.99])]).double()
    s = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    v = torch.tanh(curvature * s)
    mean = heat_by_brute_force(v, s, r, time)
    square = heat_by_brute_force(v.square(), s, r, time)
    t = torch.tensor([[curvature]], dtype=torch.float64)
    matrix = dense(ricci.flow_linear(r[None], t, time))[0]
    close(off_diagonal(matrix), off_diagonal(-torch.outer(mean, mean)), tol)
    close(matrix.diagonal(), 1 - square, tol)
    # In float32, and on a circle twice as long.
    single = ricci.flow_linear(r[None].float(), t.float(), time)
    close(single.factors[0, :, 0].double(), mean, max(tol, 1e-6))
    double = ricci.flow_linear(2 * r[None], t / 2, time, torch.full((1, 1), 2.0).double())
    close(dense(double)[0], matrix)


@seeds
def test_linear_flow_starts_at_the_lne_metric(seed: int) -> None:
    xi = 0.9 * sample(3, 10, seed=seed)
    t = ricci.tau(xi)
    start = dense(ricci.lne_metric(xi, t))
    assert torch.equal(dense(ricci.flow_linear(xi, t, 0.0)), start)
    close(dense(ricci.flow_linear(xi, t, 1e-7)), start, tol=1e-4)


@seeds
@pytest.mark.parametrize("n", [16, 144])
def test_perturbation_decays_exponentially(seed: int, n: int) -> None:
    xi = sample(1, n, seed=seed)
    clock = torch.linspace(0.02, 0.5, 49, dtype=torch.float64)
    forms = [ricci.flow_linear(xi, ricci.tau(xi), t) for t in clock.tolist()]
    # Both factors of an entry -m_i m_j fade like exp(-pi^2 t), so that the norm of them all has the
    # slope -2 pi^2 (and its square -4 pi^2).
    logs = torch.cat([form.off_diagonal_norm() for form in forms]).log()
    stack = torch.stack([clock, logs])
    slope = torch.cov(stack)[0, 1] / clock.var()
    assert slope.item() == pytest.approx(-2 * math.pi**2, rel=0.01)
    assert torch.corrcoef(stack)[0, 1].square().item() >= 0.999


@seeds
@pytest.mark.parametrize("flow", ["linear", "euler"])
@pytest.mark.parametrize("block", ["row", "kernel", 4, 1])
def test_normalization_keeps_the_determinant_of_every_row(
    seed: int, flow: Flow, block: int
) -> None:
    xi = sample(3, 23, seed=seed)
    estimator = MetricFlow(flow=flow, block=block, rule="natural", time=0.3)
    before, after = torch.zeros(3).double(), torch.zeros(3).double()
    for start, end in estimator.metrics(xi, kernel=9):
        before += torch.linalg.slogdet(dense(start)).logabsdet.sum(-1)
        after += torch.linalg.slogdet(dense(end)).logabsdet.sum(-1)
    close(after, before)
    assert (before < -0.1).all()
