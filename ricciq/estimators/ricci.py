"""The paper: potential -> divergence -> metric -> Ricci tensor -> flow -> rules of correction.

"The paper" is Chen, Chen, Wang, Dai, Tsang and Liu, "Learning Discretized Neural Networks under
Ricci Flow", arXiv 2302.03390. Formulas that it does not print are marked "derived here".

A block is a set of n coordinates that share one metric. xi, v and gradients are (blocks, n), tau is
(blocks, 1), where `blocks` may be several leading dimensions. With v = tanh(tau xi) and sigma =
|v|^2 the linearly nearly Euclidean (LNE) metric is g = I - v v^T. Its Ricci tensor and its flow
remain a diagonal plus one or two outer products: no n x n matrix is ever built.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MAX_MODES = 16  # Fourier modes of the linear flow; for shorter times its kinks are split off


def tau(xi: Tensor, rho: float = 0.9, tau_max: float = 1.0) -> Tensor:
    """Curvature min(tau_max, sqrt(rho) / |xi|), detached: sigma <= rho < 1 (derived here).

    Args:
        xi: coordinate, (blocks, n).
        rho: bound on sigma, above 0 and below 1.
        tau_max: bound on the curvature itself.

    Returns:
        (blocks, 1), positive.
    """
    norm = torch.linalg.vector_norm(xi.detach(), dim=-1, keepdim=True)
    return torch.clamp(math.sqrt(rho) / norm, max=tau_max)


def potential(xi: Tensor, tau: Tensor) -> Tensor:
    """Convex potential of the paper, sum_i log cosh(tau xi_i) / tau^2.

    Its gradient tanh(tau xi) / tau is a smooth discretization. Its Hessian is only the diagonal
    1 - v_i^2; the metric that the paper prints, and `lne_metric`, also have -v_i v_j off it.

    Args:
        xi: coordinate, (blocks, n).
        tau: curvature, (blocks, 1).

    Returns:
        (blocks,), at least 0.
    """
    return (_log_cosh(tau * xi) / tau.square()).sum(dim=-1)


def divergence(xi_new: Tensor, xi: Tensor, tau: Tensor) -> Tensor:
    """LNE divergence D[xi_new : xi] of the paper: the Bregman divergence of `potential`.

    Args:
        xi_new: coordinate of the first point, (blocks, n).
        xi: coordinate of the second point, where the potential is linearized, (blocks, n).
        tau: curvature, (blocks, 1).

    Returns:
        (blocks,), at least 0, and 0 where both points are equal.
    """
    slope = torch.tanh(tau * xi) / tau
    return potential(xi_new, tau) - potential(xi, tau) - ((xi_new - xi) * slope).sum(dim=-1)


def _log_cosh(x: Tensor) -> Tensor:
    # Near 0 the usual |x| + log1p(exp(-2|x|)) - log 2 cancels: use log1p(sinh^2) / 2.
    near, size = 0.5 * torch.log1p(torch.sinh(x.clamp(-1, 1)).square()), x.abs()
    return torch.where(size < 1, near, size + torch.log1p(torch.exp(-2 * size)) - math.log(2))


@dataclass(frozen=True)
class Metric:
    """Symmetric form diag + sum_j c_j u_j u_j^T with k <= 2 terms; every method is O(n).

    Attributes:
        diag: (blocks, n), without zeros if the form is to be solved.
        factors: the u_j, (blocks, n, k).
        coefficients: the c_j, (blocks, k).
    """

    diag: Tensor
    factors: Tensor
    coefficients: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Product g x with x of shape (blocks, n)."""
        return self.diag * x + self._span(self.coefficients * self._inner(x))

    def solve(self, x: Tensor) -> Tensor:
        """Product g^-1 x with x of shape (blocks, n), by Woodbury's identity: a k x k system."""
        determinant, adjugate = self._capacitance()
        weights = self.coefficients * self._inner(x / self.diag) / determinant.unsqueeze(-1)
        return (x - self._span((adjugate * weights.unsqueeze(-2)).sum(dim=-1))) / self.diag

    def logdet(self) -> Tensor:
        """Logarithm of det g, (blocks,), by the matrix determinant lemma; NaN if det g < 0."""
        return self.diag.log().sum(dim=-1) + self._capacitance()[0].log()

    def scaled(self, factor: Tensor) -> "Metric":
        """Multiple of g by a factor of shape (blocks, 1)."""
        return Metric(factor * self.diag, self.factors, factor * self.coefficients)

    def off_diagonal_norm(self) -> Tensor:
        """Frobenius norm of g without its diagonal, (blocks,)."""
        weighted = self._gram(self.factors) * self.coefficients.unsqueeze(-1)
        own = (self.coefficients.unsqueeze(-2) * self.factors.square()).sum(dim=-1)
        whole = (weighted * weighted.mT).sum(dim=(-1, -2))
        return (whole - own.square().sum(dim=-1)).clamp(min=0).sqrt()

    # Products and sums rather than matmul, which TF32 would round to three digits.
    def _inner(self, x: Tensor) -> Tensor:
        return (self.factors * x.unsqueeze(-1)).sum(dim=-2)

    def _span(self, weights: Tensor) -> Tensor:
        return (self.factors * weights.unsqueeze(-2)).sum(dim=-1)

    def _gram(self, other: Tensor) -> Tensor:
        return (self.factors.unsqueeze(-1) * other.unsqueeze(-2)).sum(dim=-3)

    def _capacitance(self) -> tuple[Tensor, Tensor]:
        """Determinant, (blocks,), and adjugate, (blocks, k, k), of I + C U^T A^-1 U."""
        # Not C^-1 + U^T A^-1 U, as c may be 0; not LAPACK, which crawls on many tiny systems.
        gram = self._gram(self.factors / self.diag.unsqueeze(-1))
        matrix = self.coefficients.unsqueeze(-1) * gram
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        a, *rest = matrix.flatten(-2).unbind(-1)
        if not rest:
            return a, torch.ones_like(matrix)
        b, c, d = rest
        return a * d - b * c, torch.stack([d, -b, -c, a], dim=-1).view_as(matrix)


def lne_metric(xi: Tensor, tau: Tensor) -> Metric:
    """LNE metric g = I - v v^T of the paper.

    `Metric.solve` gives its exact inverse, g^-1 x = x + v (v.x) / (1 - sigma) (Sherman-Morrison).
    The first-order inverse of the paper, x + v (v.x), differs from it in the fourth order of v.

    Args:
        xi: coordinate, (blocks, n).
        tau: curvature, (blocks, 1); the metric is positive definite exactly where sigma < 1.
    """
    v = torch.tanh(tau * xi)
    return Metric(torch.ones_like(v), v.unsqueeze(-1), -torch.ones_like(v[..., :1]))


def lne_sqrt(v: Tensor, x: Tensor) -> Tensor:
    """Square root g^1/2 x = x - v (v.x) (1 - sqrt(1 - sigma)) / sigma (derived here).

    Args:
        v: tanh(tau xi), (blocks, n).
        x: what is multiplied, (blocks, n).
    """
    # (1 - sqrt(1 - s)) / s = 1 / (1 + sqrt(1 - s)), which has no 0 / 0 at s = 0.
    return x - v * (_dot(v, x) / (1 + (1 - _dot(v, v)).sqrt()))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1, keepdim=True)


def ricci_tensor(xi: Tensor, tau: Tensor) -> Metric:
    """Ricci tensor of the LNE metric, negative semidefinite, 0 for n = 1 (derived here).

    Minkowski space induces g on the graph of sum_i log cosh(tau xi_i) / tau, and Gauss's equation
    gives Ric = -[h D - D^2 - (D v)(D v)^T / (1 - sigma)] / (1 - sigma), where D = diag(d),
    d_i = tau (1 - v_i^2) and h = sum_i d_i + sum_i d_i v_i^2 / (1 - sigma).

    Args:
        xi: coordinate, (blocks, n).
        tau: curvature, (blocks, 1), constant in every derivative.
    """
    v = torch.tanh(tau * xi)
    d = tau * (1 - v.square())
    gap = 1 - _dot(v, v)
    h = d.sum(dim=-1, keepdim=True) + _dot(d, v.square()) / gap
    return Metric(-d * (h - d) / gap, (d * v).unsqueeze(-1), gap.square().reciprocal())


def scalar_curvature(xi: Tensor, tau: Tensor) -> Tensor:
    """Trace of g^-1 Ric (derived here).

    Args:
        xi: coordinate, (blocks, n).
        tau: curvature, (blocks, 1).

    Returns:
        (blocks,), at most 0.
    """
    v, ricci = torch.tanh(tau * xi), ricci_tensor(xi, tau)
    diagonal = ricci.diag + ricci.coefficients * ricci.factors.squeeze(-1).square()
    return diagonal.sum(dim=-1) + (_dot(v, ricci.apply(v)) / (1 - _dot(v, v))).squeeze(-1)


def flow_euler(xi: Tensor, tau: Tensor, time: float) -> Metric:
    """One step g(0) - 2 time Ric(g(0)), positive definite, not normalized (derived here).

    Args:
        xi: coordinate, (blocks, n).
        tau: curvature, (blocks, 1).
        time: length of the step, from 0.
    """
    # There is no second step: the closed form of the Ricci tensor is that of the LNE metric.
    start, ricci = lne_metric(xi, tau), ricci_tensor(xi, tau)
    factors = torch.stack([start.factors[..., 0], ricci.factors[..., 0]], -2).mT  # contiguous
    coefficients = torch.cat([start.coefficients, -2 * time * ricci.coefficients], dim=-1)
    return Metric(start.diag - 2 * time * ricci.diag, factors, coefficients)


def flow_linear(xi: Tensor, tau: Tensor, time: float, half: Tensor | float = 1.0) -> Metric:
    """Ricci-DeTurck flow linearized at the Euclidean metric, not normalized (derived here).

    It is the heat flow of the metric's components, each coordinate on a circle from -half to half
    (of a residual: the quantization cell). With m and e the means of v and v^2 under the heat
    kernel, g(t) = diag(1 - e + m^2) - m m^T. Off the diagonal it decays like exp(-2 pi^2 t): the
    exponential decay that the paper claims. At t = 0 it is the LNE metric.

    v jumps where the circle closes, so a truncated Fourier series rings for small t. If `MAX_MODES`
    do not reach rounding error, the jump of v and the kink of v^2 flow in closed form and a series
    covers the rest: its error grows as t falls, to 1e-4 for tau * half <= 4, 2e-3 at 10.

    Args:
        xi: coordinate, (blocks, n), from -half to half.
        tau: curvature, (blocks, 1).
        time: t, from 0, in units of half^2.
        half: half the circle's length, a number or (blocks, 1).
    """
    if time == 0:
        return lne_metric(xi, tau)
    mean, square = _heat(xi / half, tau * half, time)
    return Metric(1 - square + mean.square(), mean.unsqueeze(-1), -torch.ones_like(mean[..., :1]))


def _heat(r: Tensor, tau: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Means of tanh(tau r) and of its square after a heat flow on the circle [-1, 1]."""
    # The first omitted mode lies below rounding error, relative to the first one kept.
    needed = math.sqrt(1 - math.log(torch.finfo(r.dtype).eps) / (math.pi**2 * time)) - 1
    modes, split = max(1, min(math.ceil(needed), MAX_MODES)), needed > MAX_MODES
    nodes, weights = (x.to(r) for x in _gauss_legendre(modes + 12))
    edge = torch.tanh(tau) if split else torch.zeros_like(tau)
    kink = tau * edge * (1 - edge.square())
    odd = torch.tanh(tau * nodes)
    odd, even = odd - edge * nodes, odd.square() - kink * nodes.square()
    waves = math.pi * torch.arange(modes + 1, dtype=r.dtype, device=r.device).unsqueeze(-1)
    fade = [2 * torch.exp(-wave.square() * time) for wave in waves]
    sine, cosine = weights * torch.sin(waves * nodes), weights * torch.cos(waves * nodes)
    sines = [f * _dot(odd, wave) for f, wave in zip(fade, sine, strict=True)]
    cosines = [f * _dot(even, wave) for f, wave in zip(fade, cosine, strict=True)]
    cos = torch.cos(math.pi * r)
    mean = _clenshaw(sines[1:], 2 * cos)[0] * torch.sin(math.pi * r)
    last, before = _clenshaw(cosines[1:], 2 * cos)
    square = torch.addcmul(cosines[0] / 2 - before, last, cos)
    if split:
        # Heat flow of r and r^2: that of the line, less what enters through the closing point.
        root, gaps = 2 * math.sqrt(time), (1 - r, 1 + r)
        right, left = (torch.erfc(gap / root) for gap in gaps)
        bump = torch.exp(-(gaps[0] / root).square()) + torch.exp(-(gaps[1] / root).square())
        around = 2 * (gaps[0] * right + gaps[1] * left - bump * root / math.sqrt(math.pi))
        mean = mean + edge * (r - right + left)
        square = square + kink * (r.square() + 2 * time + around)
    return mean, square


def _clenshaw(terms: list[Tensor], twice_cos: Tensor) -> tuple[Tensor, Tensor]:
    """Last two values of Clenshaw's recurrence: a single cosine gives every mode."""
    ahead, current = torch.zeros_like(twice_cos), terms[-1].expand_as(twice_cos)
    for term in reversed(terms[:-1]):
        ahead, current = current, torch.addcmul(term, twice_cos, current).sub_(ahead)
    return current, ahead


@lru_cache
def _gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], from the eigenvectors of the Jacobi matrix."""
    k = torch.arange(1, count, dtype=torch.float64)
    beside = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (nodes + 1) / 2, vectors[0].square()


def staircase_slope(x: Tensor, thresholds: Tensor, time: float) -> Tensor:
    """Slope of a discretization after the linear flow, derived here.

    On one coordinate a discretization induces its own derivative as a metric: a mass at each of the
    thresholds, 0 between them. That is the gradient which is "zero or infinite" in the paper. One
    coordinate has no curvature, and the linearized flow is the heat equation: each mass spreads as
    a heat kernel. Far from the ends of evenly spaced thresholds theta the slope is
    1 + 2 sum_k exp(-pi^2 k^2 t) cos(pi k (x - theta)). It tends to 1, the slope of the
    straight-through estimator, as exponentially as every perturbation decays. Near and beyond the
    last threshold it fades, where that estimator drops to 0 at once.

    Args:
        x: any shape, in half cells, as are the thresholds.
        thresholds: (count,), two half cells apart.
        time: above 0, in units of a half cell squared.

    Returns:
        The slope at each x, same shape.
    """
    slope = torch.zeros_like(x)
    for threshold in thresholds:
        slope += torch.exp((x - threshold).square() / (-4 * time))
    return slope / math.sqrt(math.pi * time)


def normalized(ends: list[Metric], starts: list[Metric]) -> list[Metric]:
    """Scale the forms g(t) by a factor per row, so that its determinant is that of g(0).

    Args:
        ends: g(t) of parts of each row, with a diagonal of shape (rows, blocks, n).
        starts: g(0) of the same parts.
    """
    changes = [a.logdet() - b.logdet() for a, b in zip(ends, starts, strict=True)]
    width = sum(start.diag.shape[1:].numel() for start in starts)
    factor = torch.exp(-torch.cat(changes, dim=1).sum(dim=1) / width)[:, None, None]
    return [end.scaled(factor) for end in ends]


def natural(end: Metric, gradient: Tensor) -> Tensor:
    """Steepest descent of the paper, g(t)^-1 G.

    Args:
        end: g(t).
        gradient: G, (blocks, n).
    """
    return end.solve(gradient)


def pullback(end: Metric, start: Metric, gradient: Tensor) -> Tensor:
    """G seen through the perturbed metric, g(t)^-1 g(0) G (derived here): G itself at t = 0.

    Args:
        end: g(t).
        start: g(0).
        gradient: G, (blocks, n).
    """
    return end.solve(start.apply(gradient))


def parallel(start: Metric, gradient: Tensor) -> Tensor:
    """Transport of G from the discrete to the continuous weight, g(0)^1/2 G (derived here).

    Args:
        start: g(0), an LNE metric.
        gradient: G, (blocks, n).
    """
    return lne_sqrt(start.factors.squeeze(-1), gradient)


def project(xi: Tensor, gradient: Tensor, strength: float) -> Tensor:
    """Plain projection G - strength xi_hat (xi_hat . G), for comparison; needs no geometry.

    Args:
        xi: coordinate, (blocks, n).
        gradient: G, (blocks, n).
        strength: the share of G along xi that is removed.
    """
    unit = torch.nn.functional.normalize(xi, dim=-1)
    return gradient - strength * unit * _dot(unit, gradient)
