"""The cosine of gradients that are known in parts."""

from __future__ import annotations

import pytest
import torch

from ricciq.estimators.cosine import Cosine


def cosine(*parts):
    sums = Cosine()
    for first, second in parts:
        sums.add(first, second)
    return sums.value


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20])
def test_parts_give_the_cosine_of_the_whole(size):
    first, second = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(0))
    expected = torch.cosine_similarity(first.flatten(), second.flatten(), dim=0).item()
    first, second = first * size, second / size
    parts = zip(first.split([1, 5]), second.split([1, 5]), strict=True)
    assert cosine(*parts) == pytest.approx(expected, rel=1e-5)
    assert cosine((first, first)) == pytest.approx(1.0, rel=1e-6)


def test_parts_may_differ_in_size():
    small, large = torch.tensor([[1e-12, 0.0]]), torch.tensor([[0.0, 1e12]])
    assert cosine((small, small), (large, -large)) == pytest.approx(-1.0)


def test_zeros_have_the_cosine_0():
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    assert cosine((zeros, ones)) == cosine((zeros, zeros)) == 0.0


def test_a_million_numbers_do_not_exceed_1():
    numbers = torch.rand(64, 100_000, generator=torch.Generator().manual_seed(0))
    assert cosine((numbers, numbers)) == pytest.approx(1.0, abs=1e-7)
