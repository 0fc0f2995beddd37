"""torch.compile: no graph breaks in quantizers, nothing compiled again after the first epoch."""

from __future__ import annotations

import functools

import pytest
import torch
from networks import DEVICE, TINY, Training, a_step, without_tf32

from ricciq.evaluation import evaluate

KINDS = [
    {},
    {"quantization.weight_quantizer": "codebook", "method.name": "dsq", "method.target": "both"},
]
"""tests/compatibility/test_compile.py has more of them; each takes its time."""


def outcome(model, images):
    torch.manual_seed(1)
    answer = model(images)
    model.zero_grad()
    answer.square().mean().backward()
    return answer.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.skipif(TINY, reason="tests/compatibility/test_compile.py does it on a CPU")
@pytest.mark.parametrize("flags", KINDS, ids=str)
def test_no_graph_breaks(flags):
    torch._dynamo.reset()
    training = Training(DEVICE, flags)
    images = training.batch()[0].to(DEVICE)
    # Capture and differentiation as in every compilation; code is generated in the next test.
    compiled = torch.compile(training.model, fullgraph=True, backend="aot_eager")
    answer, gradients = outcome(compiled, images)
    expected, expected_gradients = outcome(training.model, images)
    torch.testing.assert_close(answer, expected, rtol=1e-3, atol=1e-3)
    for gradient, same in zip(gradients, expected_gradients, strict=True):
        assert (gradient - same).norm() <= 2e-2 * same.norm() + 1e-6


def plain_compile_on_a_cpu(monkeypatch):
    """Generating C++ takes a minute; what is captured and differentiated is the same."""
    if TINY:
        plain = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", plain)


def test_a_compiled_step_is_a_step(monkeypatch):
    torch._dynamo.reset()
    without_tf32()
    plain_compile_on_a_cpu(monkeypatch)
    eager, compiled = (
        a_step(DEVICE, {"training.distill": 0.5, "compile": flag}) for flag in (False, True)
    )
    assert compiled.loss == pytest.approx(eager.loss, rel=1e-3)
    for name, change in eager.changes.items():
        assert change.any() == compiled.changes[name].any(), name
        apart = (compiled.changes[name] - change).norm()
        assert apart <= 2e-2 * change.norm() + eager.rounding(name), name


def test_three_epochs_compile_only_in_the_first(monkeypatch):
    torch._dynamo.reset()
    plain_compile_on_a_cpu(monkeypatch)
    flags = {"compile": True, "amp": not TINY, "training.epochs": 3}
    flags |= {"data.batch_size": 256, "training.distill": 0.0 if TINY else 0.5}
    training = Training(DEVICE, flags)
    holdout = training.job.loader("holdout")
    for epoch in range(3):
        with torch.compiler.set_stance("fail_on_recompile" if epoch else "default"):
            training.trainer.begin_epoch()
            batches = list(training.fit)
            for number, batch in enumerate(batches, start=1):
                assert training.step(batch, measure=number == len(batches))
            evaluate({"holdout": training.trainer.predict}, holdout)
