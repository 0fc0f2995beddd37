"""One step on the device is one step on a CPU, for every quantizer and every estimator.

In float32, without TF32. What every parameter is changed by differs by at most `TOLERANCE` of that
change: sums are taken in another order. A single code that falls to the other side of a rounding
tie changes a gradient by more than any rounding; over 40 images of digits none was seen to.
"""

from __future__ import annotations

import pytest
import torch
from networks import CPU, DEVICE, TINY, Training, without_tf32

from ricciq.estimators.registry import METHODS
from ricciq.quant import fake_quantize, quantizer

TOLERANCE = 1e-2
QUANTIZERS = [
    {"quantization.weight_quantizer": "lsq", "quantization.act_quantizer": "lsq"},
    {"quantization.weight_quantizer": "odd", "quantization.act_quantizer": "pact"},
    {"quantization.weight_quantizer": "dorefa", "quantization.act_quantizer": "fixed"},
    {"quantization.weight_quantizer": "fixed", "quantization.act_quantizer": "lsq"},
    {"quantization.weight_quantizer": "codebook", "quantization.act_quantizer": "lsq"},
    {"quantization.weight_bits": "ternary"},
    {"quantization.weight_bits": 1, "quantization.act_bits": 1},
    {"quantization.weight_bits": 8, "quantization.act_bits": 8},
    {"quantization.weight_norm": True},
]
ESTIMATORS = [
    *({"method.name": name} for name in METHODS if name != "stochastic"),
    {"method.name": "ewgs", "method.target": "both"},
    {"method.name": "ricci", "method.target": "weights", "method.correction": "pullback"},
    {"method.name": "ricci", "method.target": "weights", "method.correction": "natural"},
    {"method.name": "ricci", "method.target": "weights", "method.flow": "euler"}
    | {"method.correction": "natural"},
]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    without_tf32()
    # With 8 bits a cell is so small that the last bit of exp moves weights across thresholds.
    own = fake_quantize.positive

    def positive(log_scale):
        return own(log_scale.cpu()).to(log_scale.device)

    for module in (fake_quantize, quantizer):
        monkeypatch.setattr(module, "positive", positive)


def a_step(device, flags):
    training = Training(device, {"training.opt": "momentum", "training.lr": 0.05, **flags})
    before = training.parameters()
    assert training.step(measure=True)
    changes = {name: after - before[name] for name, after in training.parameters().items()}
    return float(training.tally.loss), changes, training.trainer.geometry


def name_of(flags):
    return "-".join(f"{key.partition('.')[2]}={value}" for key, value in flags.items())


CASES = [*QUANTIZERS, *ESTIMATORS]


@pytest.mark.parametrize("flags", CASES[4::12] if TINY else CASES, ids=name_of)
def test_a_step(flags):
    loss, changes, geometry = a_step(CPU, flags)
    same_loss, same_changes, same_geometry = a_step(DEVICE, flags)
    assert same_loss == pytest.approx(loss, rel=1e-4)
    for name, change in changes.items():
        apart = float((same_changes[name] - change).norm())
        assert apart <= TOLERANCE * float(change.norm()) + 1e-7, name
    for name, measured in geometry.items():
        expected = pytest.approx(measured._asdict(), rel=1e-2, abs=1e-3)
        assert same_geometry[name]._asdict() == expected, name


def test_stochastic_rounding_is_right_on_average():
    training = Training(DEVICE, {"method.name": "stochastic"})
    layer = training.model.get_submodule("layer1.0.conv1")
    plain = layer.weight_quantizer.ratio(layer.weight)
    inside = plain.abs() < 0.9
    rounded = []
    for seed in range(200):
        torch.manual_seed(seed)
        with torch.no_grad():
            rounded.append(layer.weight_quantizer(layer.weight))
    scale = layer.weight_quantizer.scale.view(-1, 1, 1, 1)
    mean = torch.stack(rounded).mean(0) / scale
    assert float((mean - plain)[inside].abs().mean()) < 0.05
