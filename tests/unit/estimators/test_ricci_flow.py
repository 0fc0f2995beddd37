"""The settings of the method, and the parts that they make."""

import math

import pytest
import torch

from ricciq.estimators.apply import Correction
from ricciq.estimators.catalog import CATALOG
from ricciq.estimators.metric_flow import MetricFlow
from ricciq.estimators.projection import Projection
from ricciq.estimators.registry import named_correction
from ricciq.estimators.ricci_flow import RicciFlow
from ricciq.estimators.staircase import StaircaseFlow
from ricciq.estimators.step_bound import StepBound


@pytest.mark.parametrize("rule", ["natural", "pullback", "parallel"])
def test_a_rule_of_metrics_makes_a_metric_flow(rule):
    settings = {"coordinate": "weight", "block": 9, "flow": "euler", "time": 0.5}
    settings |= {"schedule": "cosine", "rho": 0.5, "tau_max": 2.0}
    expected = MetricFlow(rule=rule, **settings)
    assert RicciFlow(correction=rule, **settings).estimator == expected


def test_by_default_it_is_the_pullback_on_rows():
    assert RicciFlow().estimator == MetricFlow()
    assert RicciFlow().as_correction() == Correction(MetricFlow(), "weights", StepBound())


def test_staircase_makes_the_flow_of_single_numbers():
    flow = RicciFlow(correction="staircase", time=0.5, schedule="growing", max_codes=8, rho=0.5)
    assert flow.estimator == StaircaseFlow(0.5, "growing", 8)


def test_project_makes_a_projection():
    flow = RicciFlow(correction="project", coordinate="weight", block="kernel", strength=0.5)
    assert flow.estimator == Projection("weight", "kernel", 0.5)


def test_trust_makes_a_bound_on_steps():
    assert RicciFlow(trust=0.2).as_correction("both").step_bound == StepBound(0.2)


def test_a_flow_goes_into_training_as_its_method_does():
    flow = RicciFlow(**CATALOG["ricci"].defaults)
    assert flow.as_correction() == named_correction("ricci", {})
    with pytest.raises(TypeError, match="as_correction"):
        Correction(flow, "weights")  # type: ignore[arg-type]


@pytest.mark.parametrize("correction", ["natural", "project", "staircase"])
def test_it_corrects_as_its_estimator_does(correction):
    gradient, xi = torch.randn(3, 8), torch.rand(3, 8) - 0.5
    mask = torch.arange(8).expand(3, 8) < 6
    flow = RicciFlow(correction=correction, block="kernel", schedule="linear")
    expected = flow.estimator.correct(gradient, xi, 2, mask, 0.5)
    assert torch.equal(flow.correct(gradient, xi, 2, mask, 0.5), expected)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *[("rho", x) for x in (0.0, 1.0, -0.1, math.nan)],
        *[("tau_max", x) for x in (0.0, -1.0, math.inf, math.nan)],
        *[("time", x) for x in (-0.1, math.inf, math.nan)],
        *[("strength", x) for x in (math.inf, math.nan)],
        *[("block", x) for x in (0, -3, 1.5, True, "layer")],
        *[("max_codes", x) for x in (1, 4.0, True)],
        *[("trust", x) for x in (0, -0.1, math.inf)],
        ("coordinate", "angle"),
        ("flow", "upwards"),
        ("correction", "magic"),
        ("schedule", "measured"),  # which version 0.1.0 had
    ],
)
def test_invalid_settings_are_refused_by_name(name: str, bad: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is .*; give .*\.$"):
        RicciFlow(**{name: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"flow": "euler"}, {"flow": "none"}, {"coordinate": "weight"}])
def test_settings_that_a_staircase_does_not_support_are_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} is .*staircase does not support; give "):
        RicciFlow(correction="staircase", **changes)
