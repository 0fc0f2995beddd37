"""One step on the device is one step on a CPU, for every quantizer and every estimator.

In float32, without TF32. What every parameter is changed by differs by at most `TOLERANCE` of that
change: sums are taken in another order. A single code that falls to the other side of a rounding
tie changes a gradient by more than any rounding; over 40 images of digits none was seen to below 8
bits. With 8 bits, codes are so fine that some always do.
"""

from __future__ import annotations

import pytest
import torch
from networks import CPU, DEVICE, TINY, Training, a_step, without_tf32

from ricciq.estimators.registry import METHODS
from ricciq.quant import fake_quantize, quantizer

TOLERANCE = 1e-2
TOLERANCE_AT_8_BITS = 5e-2
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


def name_of(flags):
    return "-".join(f"{key.partition('.')[2]}={value}" for key, value in flags.items())


CASES = [*QUANTIZERS, *ESTIMATORS]


@pytest.mark.parametrize("flags", CASES[4::12] if TINY else CASES, ids=name_of)
def test_a_step(flags):
    step, same = (a_step(device, flags, measure=True) for device in (CPU, DEVICE))
    tolerance = TOLERANCE_AT_8_BITS if flags.get("quantization.act_bits") == 8 else TOLERANCE
    assert same.loss == pytest.approx(step.loss, rel=tolerance / 100)
    for name, change in step.changes.items():
        apart = (same.changes[name] - change).norm()
        assert apart <= tolerance * change.norm() + step.rounding(name), name
    for name, measured in step.geometry.items():
        expected = pytest.approx(measured._asdict(), rel=tolerance, abs=1e-3)
        assert same.geometry[name]._asdict() == expected, name


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
