"""The registry of kinds of layers: what it finds, what it refuses, and that traits are complete."""

import pytest
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import nn

from ricciq.convert.plan import LayerPlan, Plan
from ricciq.convert.rewrite import convert
from ricciq.layers.base import QuantLayer
from ricciq.layers.conv import QuantConv2d
from ricciq.layers.linear import QuantLinear, QuantLinearWeight
from ricciq.layers.registry import float_classes, kind_of, layer_kinds, quantizes, why_not


class Named(nn.Conv2d):
    """A subclass that only differs in how it is built."""

    def __init__(self, width):
        super().__init__(width, width, 1)
        self.width = width


class Changed(Named):
    """A subclass that may compute anything."""

    def forward(self, x):
        return super().forward(2 * x)


def test_a_float_layer_is_found_by_its_class():
    for conv in (nn.Conv2d(1, 1, 1), Conv2dSame(1, 1, 1), ScaledStdConv2d(1, 1, 1)):
        assert kind_of(conv) is QuantConv2d
    assert kind_of(nn.Linear(1, 1)) is QuantLinear
    assert kind_of(nn.Linear(1, 1), lent=True) is QuantLinearWeight
    assert kind_of(Named(1)) is QuantConv2d
    assert kind_of(Changed(1)) is None
    assert kind_of(nn.Conv2d(1, 1, 1), lent=True) is None


def test_reasons_for_staying_float():
    assert why_not(nn.Conv2d(1, 1, 3, padding=1)) is None
    assert why_not(nn.LayerNorm(3)) == "LayerNorm has no discrete counterpart"
    assert why_not(Changed(1)) == "Changed has no discrete counterpart"
    reflecting = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
    assert why_not(reflecting) == "reflect padding has no integer kernel"


def test_a_float_class_has_one_counterpart():
    with pytest.raises(ValueError, match="Conv2d is quantized by QuantConv2d"):
        quantizes(nn.Conv2d)(QuantLinear)
    assert kind_of(nn.Conv2d(1, 1, 1)) is QuantConv2d


@pytest.mark.parametrize("kind", layer_kinds())
def test_every_kind_says_what_the_others_ask(kind):
    assert issubclass(kind, QuantLayer)
    assert kind.operators
    assert bool(kind.kernels) != bool(kind.float_kernel)
    assert all(issubclass(norm, nn.Module) for norm in kind.norms)
    if kind.lent_to is None:
        assert kind.function is not QuantLayer.function
        assert kind.forward is not nn.Module.forward


def test_float_classes_are_named_once():
    assert len(set(float_classes())) == len(float_classes())
    assert {nn.Conv2d, nn.Linear} < set(float_classes())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (LayerPlan("gone", 2, 2, None), "no layer that it can quantize"),
        (LayerPlan("norm", 2, 2, None), "no layer that it can quantize"),
        (LayerPlan("conv", 2, 2, None, parent="conv"), "no layer that it can quantize"),
        (LayerPlan("conv", 2, 2, "linear"), "no BatchNorm of conv"),
        (LayerPlan("linear", 2, 2, "norm"), "no BatchNorm of linear"),
        (LayerPlan("linear", 2, 2, None, parent="gone"), "no Module"),
    ],
)
def test_a_plan_of_another_model_is_refused(layer, reason):
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(1, 2, 1), "norm": nn.BatchNorm2d(2), "linear": nn.Linear(2, 2)}
    )
    with pytest.raises(ValueError, match=reason):
        convert(model, Plan([layer], {}, []))
