"""Mixed precision and memory format: what is half is half, what must stay float32 does."""

from __future__ import annotations

import pytest
import torch
from networks import DEVICE, TINY, Training

from ricciq.convert.rewrite import quantized_layers
from ricciq.training import step as trainer


def step_dtypes(training):
    """Take a step; the dtypes of what the layers give, and whether it was finite."""
    seen = set()
    handles = [
        layer.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
        for layer in quantized_layers(training.model).values()
    ]
    finite = training.step()
    for handle in handles:
        handle.remove()
    return seen, finite


def test_bfloat16():
    training = Training(DEVICE, {"amp": True})
    before = training.parameters()
    seen, finite = step_dtypes(training)
    assert trainer.half_precision(DEVICE) == torch.bfloat16
    assert torch.bfloat16 in seen
    assert finite
    after = training.parameters()
    assert all(p.dtype == torch.float32 for p in after.values())
    assert all(p.isfinite().all() for p in after.values())
    assert any(not torch.equal(p, before[name]) for name, p in after.items())


def test_bfloat16_learns():
    training = Training(DEVICE, {"amp": True, "training.lr": 1e-3})
    losses = []
    for _ in range(12 if TINY else 20):
        before = float(training.tally.loss)
        assert training.step()
        losses.append(float(training.tally.loss) - before)
    assert sum(losses[-3:]) < sum(losses[:3])


def test_float16_with_its_scaler(monkeypatch):
    monkeypatch.setattr(trainer, "half_precision", lambda _: torch.float16)
    training = Training(DEVICE, {"amp": True})
    scaler = training.trainer.scaler
    assert scaler.is_enabled()
    # The first scale is too much for float16: such a step changes the scale and nothing else.
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**30})
    before = training.parameters()
    buffers = {name: b.clone() for name, b in training.model.named_buffers()}
    seen, finite = step_dtypes(training)
    assert torch.float16 in seen
    assert not finite
    assert all(torch.equal(p, before[name]) for name, p in training.parameters().items())
    assert all(torch.equal(b, buffers[name]) for name, b in training.model.named_buffers())
    while not training.step():
        assert training.tally.bad < 30
    assert scaler.get_scale() == 2.0 ** (30 - training.tally.bad)
    after = training.parameters()
    assert all(p.isfinite().all() for p in after.values())
    assert any(not torch.equal(p, before[name]) for name, p in after.items())


@pytest.mark.parametrize("amp", [False, True])
def test_channels_last_from_end_to_end(amp):
    training = Training(DEVICE, {"amp": amp})
    planar = []

    def look(name):
        def hook(module, inputs, output):  # noqa: ARG001
            for what in (inputs[0], output):
                wide = what.ndim == 4 and what.shape[1] > 1 and what.shape[2] > 1
                if wide and not what.is_contiguous(memory_format=torch.channels_last):
                    planar.append(name)

        return hook

    for name, layer in quantized_layers(training.model).items():
        layer.register_forward_hook(look(name))
    assert training.step()
    assert not planar
