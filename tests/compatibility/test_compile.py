"""A converted model is compiled as a whole, and computes what it computed before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ricciq.convert.plan import plan_conversion
from ricciq.convert.rewrite import convert
from ricciq.estimators.apply import ActivationCorrection, Correction, override_forward
from ricciq.estimators.registry import named_estimator
from ricciq.quant.calibration import calibrate
from ricciq.quant.config import QuantizerConfig

pytestmark = pytest.mark.slow

# Capture and differentiation happen as in every compilation; only code is not generated.
BACKEND = "aot_eager"


class Net(nn.Module):
    """A layer of each kind, an addition, and a first and a last layer with more bits."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8))
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.along = nn.Conv1d(4, 4, 3)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.body(x) + x)
        x = torch.relu(self.up(x)).flatten(2)
        return self.head(torch.relu(self.along(x)).mean(2))


def discrete_model(weight_bits, act_bits, config, method):
    torch.manual_seed(0)
    model = Net()
    images = torch.randn(8, 1, 8, 8)
    convert(model, plan_conversion(model.eval(), images[:2], weight_bits, act_bits), config)
    calibrate(model, [images])
    estimator = named_estimator(method, {})
    override_forward(model, Correction(estimator, "both"))
    ActivationCorrection(model, estimator)
    return model.train(), images


def outcome(model, images):
    torch.manual_seed(1)
    answer = model(images)
    model.zero_grad()
    answer.square().mean().backward()
    return answer.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("bits", "config", "method"),
    [
        ((2, 2), QuantizerConfig(), "ricci"),
        ((2, 2), QuantizerConfig(), "ste"),
        ((3, 3), QuantizerConfig("odd", "pact"), "ricci"),
        ((1, 1), QuantizerConfig("dorefa", "fixed"), "ricci"),
        (("ternary", 2), QuantizerConfig("codebook"), "dsq"),
        ((2, 2), QuantizerConfig("fixed"), "stochastic"),
    ],
)
def test_a_model_compiles_without_graph_breaks(bits, config, method):
    torch._dynamo.reset()
    model, images = discrete_model(*bits, config, method)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    answer, gradients = outcome(compiled, images)
    if method == "stochastic":  # its numbers may be drawn in another order
        assert answer.isfinite().all()
        return
    expected, expected_gradients = outcome(model, images)
    torch.testing.assert_close(answer, expected)
    for gradient, same in zip(gradients, expected_gradients, strict=True):
        assert (gradient - same).norm() <= 5e-3 * same.norm() + 1e-7


def test_a_change_of_stage_compiles_nothing_again():
    torch._dynamo.reset()
    model, images = discrete_model(2, 2, QuantizerConfig(), "ricci")
    graphs = []

    def backend(graph, inputs):  # noqa: ARG001
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    stages = ActivationCorrection(model, named_estimator("ricci", {"schedule": "linear"}))
    for progress in (0.0, 0.3, 0.9):
        stages.advance(progress)
        compiled(images).sum().backward()
    assert len(graphs) == 1
