"""Rounding in pieces that fit a cache gives what rounding at once does."""

import pytest
import torch
from torch import Tensor

from ricciq.estimators.registry import METHODS
from ricciq.quant import fake_quantize as rounding
from ricciq.quant.fake_quantize import SLOPE_SAMPLES, fake_quantize
from ricciq.quant.grid import UniformGrid

SHAPE = (3, 5, 4, 2)


def draw(layout: str, dtype: torch.dtype) -> Tensor:
    x = 3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "turned":
        x = x.permute(3, 0, 2, 1)
    elif layout == "with gaps":
        x = torch.cat([x, x], dim=1)[:, ::2]
    return x.to(dtype)


def all_of(x: Tensor, log_scale: Tensor, **settings) -> list[Tensor]:
    """What comes out, and both gradients."""
    x, log_scale = x.detach().requires_grad_(), log_scale.clone().requires_grad_()
    y = fake_quantize(x, log_scale, UniformGrid(0, 3), gain=0.5, **settings)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return [y.detach(), x.grad, log_scale.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["plain", "channels last", "turned", "with gaps"])
@pytest.mark.parametrize("how", ["per tensor", "pact", "sloped", "per row"])
def test_pieces_give_what_the_whole_does(monkeypatch, how, layout, dtype):
    x = draw(layout, dtype)
    log_scale, settings = torch.tensor(0.2), {"zero_point": torch.tensor(1.0)}
    if how == "pact":
        settings["clip_only"] = True
    elif how == "sloped":
        settings["slope"] = METHODS["ricci"].slope(4, SLOPE_SAMPLES, 0.0)
    elif how == "per row":
        log_scale, settings = torch.linspace(-1, 1, len(x)).view(-1, 1, 1, 1), {}
    whole = all_of(x, log_scale, **settings)
    monkeypatch.setattr(rounding, "CACHED", 7)
    calls, round_codes = [], rounding.round_codes
    monkeypatch.setattr(
        rounding, "round_codes", lambda *args: calls.append(args[0].shape) or round_codes(*args)
    )
    pieces = all_of(x, log_scale, **settings)
    assert len(calls) > 2  # forward and backward took several each
    for piece, once in zip(pieces[:2], whole[:2], strict=True):
        assert piece.dtype == x.dtype
        assert torch.equal(piece, once)
    torch.testing.assert_close(pieces[2], whole[2], rtol=1e-5, atol=1e-5)


def test_what_comes_out_lies_in_memory_as_what_went_in():
    for layout in ("plain", "channels last", "turned"):
        x = draw(layout, torch.float32)
        assert fake_quantize(x, torch.tensor(0.0), UniformGrid(0, 3)).stride() == x.stride()


def test_a_gradient_that_is_one_number_everywhere_is_enough():
    x = draw("channels last", torch.float32).requires_grad_()
    fake_quantize(x, torch.tensor(0.0), UniformGrid(-9, 9)).sum().backward()
    assert torch.equal(x.grad, (x.abs() <= 9).float())


def test_no_pictures_are_no_error():
    x, log_scale = torch.zeros(0, 2, requires_grad=True), torch.zeros((), requires_grad=True)
    fake_quantize(x, log_scale, UniformGrid(0, 3)).sum().backward()
    assert (x.grad.shape, log_scale.grad.item()) == ((0, 2), 0)
