"""The search for scales beside the one that tries all candidates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ricciq.quant.grid import UniformGrid
from ricciq.quant.scale_search import EVALUATIONS, SHORT, best_scales

CANDIDATES = 100
GRIDS = {bits: UniformGrid.for_weights(bits) for bits in (1, 2, 3, 4, 5, 6, 7, 8, "ternary")}
GRIDS["odd"] = UniformGrid.for_weights(3, odd=True)


def weights(kind: str, count: int) -> Tensor:
    """200 rows with so many weights."""
    chance = torch.Generator().manual_seed(0)
    normal = torch.randn(200, count, generator=chance)
    if kind == "heavy tails":  # Student's t with 4 degrees of freedom
        return normal / (torch.randn(4, 200, count, generator=chance).square().mean(0)).sqrt()
    if kind == "uniform":
        return torch.rand(200, count, generator=chance) - 0.5
    return normal if kind == "normal" else normal.abs()


def squared_error(rows: Tensor, scale: Tensor, grid: UniformGrid) -> Tensor:
    return (grid.round(rows / scale) * scale - rows).square().sum(1)


def exhaustive(rows: Tensor, grid: UniformGrid) -> Tensor:
    """The least squared error of each row over all candidates."""
    top = rows.abs().amax(1, keepdim=True) / grid.high
    fractions = torch.arange(1, CANDIDATES + 1) / CANDIDATES
    return torch.stack([squared_error(rows, top * f, grid) for f in fractions]).amin(0)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "uniform", "one sign"])
@pytest.mark.parametrize("name", list(GRIDS))
def test_the_error_is_no_higher_than_by_trying_all(name: str, kind: str) -> None:
    grid, found, least = GRIDS[name], 0.0, 0.0
    for count in (64, 576, 1024):
        rows = weights(kind, count)
        found += float(squared_error(rows, best_scales(rows, grid, CANDIDATES), grid).sum())
        least += float(exhaustive(rows, grid).sum())
    assert found <= least * 1.001


@pytest.mark.parametrize("name", list(GRIDS))
def test_short_rows_try_all(name: str) -> None:
    grid, rows = GRIDS[name], weights("normal", 9)
    error = squared_error(rows, best_scales(rows, grid, CANDIDATES), grid)
    torch.testing.assert_close(error, exhaustive(rows, grid))


def test_few_scales_are_tried_for_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    round_ratio = UniformGrid.round
    monkeypatch.setattr(
        UniformGrid, "round", lambda grid, ratio: tried.append(1) or round_ratio(grid, ratio)
    )
    best_scales(weights("normal", SHORT), GRIDS[4], CANDIDATES)
    assert len(tried) == EVALUATIONS
    tried.clear()
    best_scales(weights("normal", SHORT - 1), GRIDS[4], CANDIDATES)
    assert len(tried) == CANDIDATES
    tried.clear()
    best_scales(weights("normal", SHORT), GRIDS[4], 3)
    assert len(tried) == 3


@pytest.mark.parametrize("count", [9, 128])
def test_rows_of_zeros_and_of_one_size_have_positive_scales(count: int) -> None:
    rows = torch.stack([torch.zeros(count), torch.full((count,), 0.3), torch.ones(count) * 1e-30])
    for grid in GRIDS.values():
        scale = best_scales(rows, grid, CANDIDATES)
        assert scale.shape == (3, 1)
        assert (scale > 0).all()
        assert scale.isfinite().all()
    exact = best_scales(rows[1:2], GRIDS[2], CANDIDATES)
    assert math.isclose(float(squared_error(rows[1:2], exact, GRIDS[2])), 0, abs_tol=1e-3)
