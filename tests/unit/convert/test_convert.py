"""The plan: what becomes discrete, where points stand, what is kept and why; and the rewriting."""

from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.convert.plan import LayerPlan, plan_conversion
from ricciq.convert.rewrite import convert, quantize, quantized_layers
from ricciq.errors import ModelError
from ricciq.layers.conv import QuantConv2d
from ricciq.layers.linear import QuantLinear, QuantLinearWeight
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.calibration import calibrate
from ricciq.quant.weight import WeightQuantizer

PICTURE = torch.zeros(1, 3, 8, 8)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Model(nn.Module):
    """Some layers and a forward given as a function of the model and its input."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int = 3, outputs: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def reasons(plan) -> dict[str, str]:
    return {kept.name: kept.why for kept in plan.kept}


# ResNet-18


@pytest.fixture(scope="module")
def resnet_plan():
    """The plan for a ResNet-18 with two bits."""
    model = timm.create_model("resnet18", num_classes=10, pretrained=False)
    return plan_conversion(model, torch.zeros(1, 3, 64, 64), 2, 2)


@pytest.fixture(scope="module")
def resnet(resnet_plan):
    """That plan, a ResNet-18 of 64 channels throughout converted by it, and its parameters."""
    torch.manual_seed(0)
    # timm starts the last norm of a block at zero, where nothing behind it would have a gradient
    model = timm.create_model(
        "resnet18", num_classes=10, pretrained=False, channels=(64,) * 4, zero_init_last=False
    )
    before = dict(model.named_parameters())
    return resnet_plan, convert(model, resnet_plan), before


def test_the_first_and_the_last_layer_get_eight_bits(resnet_plan):
    layers = resnet_plan.layers
    assert layers[0] == LayerPlan("conv1", 8, 8, "bn1")
    assert layers[-1] == LayerPlan("fc", 8, 8, None)
    assert {(layer.weight_bits, layer.act_bits) for layer in layers[1:-1]} == {(2, 2)}


def test_every_convolution_takes_its_norm(resnet_plan):
    assert len(resnet_plan.layers) == 21
    for layer in resnet_plan.layers[:-1]:
        *path, last = layer.name.split(".")
        expected = {"conv1": "bn1", "conv2": "bn2", "0": "1"}[last]
        assert layer.norm == ".".join([*path, expected])
    assert resnet_plan.kept == []


def test_points_stand_where_the_runtime_needs_them_and_nowhere_else(resnet_plan):
    expected = {"act1": "act1", "maxpool": "act1"}  # the maximum of codes is one of them
    for stage in (1, 2, 3, 4):
        expected |= {f"layer{stage}.{b}.bn2": f"layer{stage}.{b}.bn2" for b in (0, 1)}
        # The first block's output is the second's shortcut; the second's goes to convolutions only.
        expected[f"layer{stage}.0.act2"] = f"layer{stage}.0.act2"
        if stage > 1:
            expected[f"layer{stage}.0.downsample.1"] = f"layer{stage}.0.downsample.1"
    expected["layer4.1.act2"] = "layer4.1.act2"  # a sum that is only pooled
    assert resnet_plan.points == expected


def test_conversion_follows_the_plan_and_keeps_parameters(resnet):
    plan, model, before = resnet
    layers = quantized_layers(model)
    assert set(layers) == {layer.name for layer in plan.layers}
    for layer in plan.layers:
        made = layers[layer.name]
        assert made.weight is before[f"{layer.name}.weight"]
        assert made.weight_quantizer.bits == layer.weight_bits
        assert made.input_quantizer.bits == layer.act_bits
        if layer.norm:
            assert made.norm.weight is before[f"{layer.norm}.weight"]
            # its points stay with the name, the norm itself moved into the layer
            assert isinstance(model.get_submodule(layer.norm), nn.Identity)
    for name, source in plan.points.items():
        used = model.get_submodule(name).output_quantizer
        assert used is model.get_submodule(source).output_quantizer
        assert used.bits == 8
    assert sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for n, p in model.named_parameters() if "quantizer" in n
    ) == sum(p.numel() for p in before.values())


def test_eight_bits_before_calibration_are_close_to_float(tiny_net, pictures):
    model = tiny_net()
    expected = model(pictures)
    quantize(model, pictures[:1], 8, 32)
    torch.testing.assert_close(model(pictures), expected, rtol=0.02, atol=0.02)
    assert not torch.equal(model(pictures), expected)


def test_points_quantize(resnet):
    _, model, _ = resnet
    calibrate(model, [torch.randn(4, 3, 64, 64)])
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, args, output, name=name: seen.update({name: output.clone()})  # noqa: ARG005
        )
        for name in ("maxpool", "layer1.0.bn2", "layer2.0.downsample.1")
    ]
    model.eval()(torch.randn(2, 3, 64, 64))
    for handle in handles:
        handle.remove()
    assert len(seen) == 3
    for name, output in seen.items():
        point = model.get_submodule(name).output_quantizer
        codes = output / point.scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert codes.round().unique().numel() <= 256


def gradients_are_finite_everywhere(model: nn.Module, size: int) -> None:
    torch.manual_seed(2)
    calibrate(model, [torch.randn(4, 3, size, size)])
    model.train()
    loss = F.cross_entropy(model(torch.randn(8, 3, size, size)), torch.arange(8))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    quantizers = [
        m for m in model.modules() if isinstance(m, ActivationQuantizer | WeightQuantizer)
    ]
    assert all(m.log_scale.grad.abs().max() > 0 for m in quantizers)


def test_a_training_step_reaches_every_quantizer_and_weight(resnet):
    gradients_are_finite_everywhere(resnet[1], 64)


# MobileNet: norms that carry an activation


def test_every_convolution_takes_the_norm_of_its_activated_norm():
    model = timm.create_model("mobilenetv2_100", num_classes=10, pretrained=False)
    norms = {n for n, m in model.named_modules() if isinstance(m, BatchNormAct2d)}
    plan = quantize(model, torch.zeros(1, 3, 64, 64), 8, 32)
    assert len(norms) == 52
    assert {layer.norm for layer in plan.layers} - {None} == norms
    assert [layer.name for layer in plan.layers if layer.norm is None] == ["classifier"]
    assert plan.kept == []
    assert not any(isinstance(m, BatchNormAct2d) for m in model.modules())
    assert sum(isinstance(m, nn.ReLU6) for m in model.modules()) == 35


@pytest.mark.parametrize("apply_act", [True, False])
def test_the_activation_of_an_activated_norm_stays(apply_act):
    norm = BatchNormAct2d(3, act_layer=nn.ReLU6, apply_act=apply_act).eval()
    nn.init.normal_(norm.running_mean)
    norm.weight.data[:] = torch.tensor([2.0, -1.0, 20.0])
    model = nn.Sequential(conv(), norm, nn.Conv2d(3, 3, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    quantize(model, x, 8, 32)
    discrete = F.conv2d(x, model[0].weight_quantizer(model[0].weight), model[0].bias, padding=1)
    expected = norm(discrete)
    assert bool((expected < 0).any()) is not apply_act
    torch.testing.assert_close(model[1](model[0](x)), expected)


def test_a_training_step_reaches_every_quantizer_of_a_depthwise_net():
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_035", num_classes=10, pretrained=False)
    quantize(model, torch.zeros(1, 3, 64, 64), 4, 4)
    gradients_are_finite_everywhere(model, 64)


# What is kept, and why


def test_a_layer_that_does_not_run_is_kept_and_listed():
    model = Model(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(), unused=conv())
    plan = quantize(model, PICTURE, 2, 2)
    assert [layer.name for layer in plan.layers] == ["a", "b"]
    assert list(reasons(plan)) == ["unused"]
    assert "did not run" in reasons(plan)["unused"]
    assert type(model.unused) is nn.Conv2d


def test_reflect_padding_is_kept_and_its_norm_with_it():
    model = nn.Sequential(conv(), conv(padding_mode="reflect"), nn.BatchNorm2d(3), conv())
    plan = quantize(model, PICTURE, 2, 2)
    assert [layer.name for layer in plan.layers] == ["0", "3"]
    assert list(reasons(plan)) == ["1", "2"]
    assert "reflect padding" in reasons(plan)["1"]
    assert type(model[1]) is nn.Conv2d


@pytest.mark.parametrize(
    "layer", [nn.InstanceNorm2d(3, affine=True), nn.GroupNorm(1, 3), nn.PReLU(), nn.Conv2d(3, 3, 1)]
)
def test_what_has_no_counterpart_is_kept_by_its_class(layer):
    if type(layer) is nn.Conv2d:
        layer.__class__ = type("SpecialConv", (nn.Conv2d,), {"forward": nn.Conv2d.forward})
    plan = quantize(nn.Sequential(conv(), layer, conv()), PICTURE, 2, 2)
    assert reasons(plan) == {"1": f"{type(layer).__name__} has no discrete counterpart"}


def test_a_norm_behind_an_output_with_two_readers_is_kept():
    def forward(m, x):
        y = m.a(x)
        return m.b(m.norm(y) * y)

    model = Model(forward, a=conv(), norm=nn.BatchNorm2d(3), b=conv())
    plan = quantize(model, PICTURE, 2, 2)
    assert plan.layers[0].norm is None
    assert "does not directly follow one convolution" in reasons(plan)["norm"]
    assert type(model.norm) is nn.BatchNorm2d
    assert list(plan.points) == ["a"]


@pytest.mark.parametrize(
    "model",
    [
        Model(lambda m, x: m.b(m.n(m.a(m.n(m.a(x))))), a=conv(), n=nn.BatchNorm2d(3), b=conv()),
        Model(lambda m, x: m.b(m.n(m.a(x)) + m.n(x)), a=conv(), n=nn.BatchNorm2d(3), b=conv()),
        nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(3), conv()),
        nn.Sequential(conv(), nn.BatchNorm2d(3, track_running_stats=False), conv()),
    ],
    ids=["both run twice", "the norm runs twice", "behind a ReLU", "without statistics"],
)
def test_a_norm_that_cannot_be_folded_is_kept(model):
    plan = quantize(model, PICTURE, 2, 2)
    assert all(layer.norm is None for layer in plan.layers)
    assert any("does not directly follow" in why for why in reasons(plan).values())


def test_an_addition_of_what_no_module_returned_is_listed():
    inner = Model(lambda m, x: m.b(m.a(x) + x * 2), a=conv(), b=conv())
    plan = quantize(Model(lambda m, x: m.inner(x), inner=inner), PICTURE, 2, 2)
    (kept,) = plan.kept
    assert (kept.name, kept.kind) == ("inner", "addition")
    assert "not the output of a module" in kept.why
    assert list(plan.points) == ["inner.a"]


@pytest.mark.parametrize(
    ("read", "is_quantized"),
    [
        (lambda m, x: m.fc(x.mean((2, 3))), True),
        (lambda m, x: m.fc(m.pool(x).flatten(1)), True),
        (lambda m, x: m.fc(x.mean((2, 3)) + x.amax((2, 3))), False),
        (lambda m, x: m.fc(x.flatten(1)), False),
        (lambda m, x: x, False),  # noqa: ARG005
        (lambda m, x: (m.fc(x.mean((2, 3))), x), False),
    ],
    ids=["mean", "a module", "also the maximum", "flattened", "returned", "pooled and returned"],
)
def test_a_sum_that_is_only_pooled_has_a_point(read, is_quantized):
    def forward(m, x):
        return read(m, m.relu(m.a(x) + m.b(x)))

    head = nn.LazyLinear(2)
    parts = {"a": conv(), "b": conv(), "relu": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1)}
    model = Model(forward, **parts, fc=head)
    model(PICTURE)
    points = quantize(model, PICTURE, 2, 2).points
    assert set(points) == ({"a", "b", "relu"} if is_quantized else {"a", "b"})


def test_an_addition_of_a_number_needs_no_point():
    plan = quantize(Model(lambda m, x: m.b(m.a(x) + 1), a=conv(), b=conv()), PICTURE, 2, 2)
    assert plan.kept == []
    assert list(plan.points) == ["a"]  # read by the addition, not by a layer


def test_products_of_activations_are_listed():
    def forward(m, x):
        y = m.a(x)
        return m.b(torch.matmul(y, y))

    plan = quantize(Model(forward, a=conv(), b=conv()), PICTURE, 2, 2)
    assert reasons(plan) == {"": "products of two activations stay float"}


def test_a_function_on_weights_is_listed():
    other = nn.Parameter(torch.zeros(3, 3, 1, 1))
    model = Model(lambda m, x: m.b(F.conv2d(m.a(x), other)), a=conv(), b=conv())
    assert "no layer owns" in reasons(quantize(model, PICTURE, 2, 2))[""]


def test_a_block_of_plain_layers_needs_no_point():
    model = nn.Sequential(
        conv(), nn.BatchNorm2d(3), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.Flatten()
    )
    plan = quantize(model, PICTURE, 2, 2)
    assert plan.kept == []
    assert plan.points == {"5": "5"}  # read by Flatten, which is a module


def test_layers_that_read_the_same_tensor_share_a_quantizer(resnet):
    plan, model, _ = resnet
    sources = {layer.name: layer.input_of for layer in plan.layers if layer.input_of}
    stages = (2, 3, 4)
    assert sources == {f"layer{n}.0.downsample.0": f"layer{n}.0.conv1" for n in stages}
    for name, source in sources.items():
        used = model.get_submodule(name).input_quantizer
        assert used is model.get_submodule(source).input_quantizer


def test_branches_that_share_a_quantizer_need_no_point():
    def forward(m, x):
        x = m.start(x)
        return m.end(torch.cat([m.one(x), m.two(x)], dim=1))

    layers = {"start": conv(), "one": conv(), "two": conv(), "end": conv(6)}
    model = Model(forward, **layers)
    plan = quantize(model, PICTURE, 2, 2)
    assert set(plan.points) == {"one", "two"}
    assert model.two.input_quantizer is model.one.input_quantizer


def test_layers_share_no_quantizer_if_their_widths_differ_or_one_runs_twice():
    layers = {"start": conv(), "one": conv(), "two": conv(), "end": conv()}
    widths = Model(lambda m, x: m.one(m.start(x)) + m.two(x) + m.end(x), **layers)
    plan = plan_conversion(widths, PICTURE, 2, 2)
    assert {layer.name: layer.input_of for layer in plan.layers} == {
        "start": None, "one": None, "two": None, "end": "start"
    }  # fmt: skip
    twice = Model(lambda m, x: m.end(m.one(m.one(x)) + m.two(x)), **layers)
    assert {layer.input_of for layer in plan_conversion(twice, PICTURE, 2, 2).layers} == {None}


@pytest.mark.parametrize("source", ["two", "nowhere", "start"])
def test_a_plan_whose_layers_cannot_share_is_refused(source):
    layers = {"start": conv(), "one": conv(), "two": conv(), "end": conv()}
    model = Model(lambda m, x: m.end(m.one(m.start(x)) + m.two(m.start(x))), **layers)
    plan = plan_conversion(model, PICTURE, 2, 2)
    first, one, *others = plan.layers
    changed = replace(plan, layers=[first, replace(one, input_of=source), *others])
    with pytest.raises(ValueError, match=f"'{source}', whose input one cannot use"):
        convert(model, changed)


def test_every_operand_of_a_chain_of_additions_gets_a_point():
    def forward(m, x):
        x = m.start(x)
        x = m.one(x) + x
        return m.end(m.two(x) + x)

    block = Model(lambda m, x: m.a(x) + x, a=conv())
    layers = {"start": conv(), "one": conv(), "two": block, "end": conv()}
    plan = quantize(Model(forward, **layers), PICTURE, 2, 2)
    # The sum of the first addition belongs to no module, so the next additions cannot be integer.
    assert {"start", "one"} <= set(plan.points)
    assert {kept.name for kept in plan.kept} == {"", "two"}


def test_a_convolution_that_makes_tokens_stays_float():
    layers = {"embed": nn.Conv2d(3, 8, 4, 4), "head": nn.Linear(8, 2)}
    model = Model(lambda m, x: m.head(m.embed(x).flatten(2).transpose(1, 2)), **layers)
    plan = quantize(model, PICTURE, 2, 2)
    assert plan.points == {}
    assert "tokens" in reasons(plan)["embed"]


def test_a_sum_of_integer_sums_is_integer():
    block = {name: Model(lambda m, x: m.a(x) + x, a=conv()) for name in ("one", "two")}

    def forward(m, x):
        x = m.start(x)
        return m.end(m.one(x) + m.two(x))

    plan = quantize(Model(forward, start=conv(), **block, end=conv()), PICTURE, 2, 2)
    assert {"one", "two"} <= set(plan.points)
    assert plan.kept == []


# Widths


def test_32_bits_convert_nothing():
    model = nn.Sequential(conv(), nn.BatchNorm2d(3), conv())
    before = list(model.modules())
    plan = quantize(model, PICTURE, 32, 2)
    assert (plan.layers, plan.points) == ([], {})
    assert "stays float" in plan.kept[0].why
    assert list(model.modules()) == before


@pytest.mark.parametrize("weight_bits", [1, 4, 8, "ternary"])
def test_float_activations_give_no_point_and_no_input_quantizer(weight_bits):
    model = Model(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(), b=conv(), c=conv())
    plan = quantize(model, PICTURE, weight_bits, 32)
    assert [(layer.weight_bits, layer.act_bits) for layer in plan.layers] == [
        (8, 32),
        (weight_bits, 32),
        (8, 32),
    ]
    assert plan.points == {}
    assert plan.kept == []
    assert not any(isinstance(m, ActivationQuantizer) for m in model.modules())


def test_the_width_at_the_ends_can_be_chosen():
    plan = quantize(nn.Sequential(conv(), conv(), conv()), PICTURE, 2, 3, edge_bits=4)
    widths = [(layer.weight_bits, layer.act_bits) for layer in plan.layers]
    assert widths == [(4, 4), (2, 3), (4, 4)]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.ReLU(), nn.Flatten()),
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")),
    ],
)
def test_a_model_without_convertible_layers_is_refused(model):
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        quantize(model, PICTURE, 2, 2)


# Rewriting


def test_a_shared_layer_is_converted_once_and_used_twice():
    model = Model(lambda m, x: m.b(m.a(m.a(x))), a=conv(), b=conv())
    quantize(model, PICTURE, 8, 32)
    assert list(quantized_layers(model)) == ["a", "b"]
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 3, 8, 8)


def test_a_layer_with_two_names_is_converted_under_both():
    shared = conv()
    model = Model(lambda m, x: m.d(m.c(m.b(m.a(x)))), a=conv(), b=shared, c=shared, d=conv())
    quantize(model, PICTURE, 2, 2)
    assert isinstance(model.b, QuantConv2d)
    assert model.c is model.b


def test_a_module_that_returns_a_tuple_can_feed_an_addition():
    def forward(m, x):
        x = m.a(x)
        return m.b(x + m.attention(x, x, x)[0])

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    layers = {"a": nn.Linear(8, 8), "attention": attention, "b": nn.Linear(8, 3)}
    model = Model(forward, **layers)
    tokens = torch.randn(2, 5, 8)
    quantize(model, tokens[:1], 4, 4)
    calibrate(model, [tokens])
    assert model(tokens).isfinite().all()


def test_linear_layers_are_converted_and_their_additions_stay_float():
    def forward(m, x):
        x = m.a(x)
        return m.c(m.b(x) + x)

    layers = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 2)}
    model = Model(forward, **layers)
    plan = quantize(model, torch.randn(1, 5, 8), 4, 4)
    assert all(isinstance(m, QuantLinear) for m in quantized_layers(model).values())
    assert plan.points == {}


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_kept(training):
    model = nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), conv()).train(training)
    quantize(model, PICTURE, 2, 2)
    assert all(m.training is training for m in quantized_layers(model).values())
    assert model[0].norm.training is training


# Weights that are read rather than layers that are called


class Lending(nn.Module):
    """An attention's projection as BEiT writes it."""

    def __init__(self, reads_twice: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8, bias=False)
        self.own_bias = nn.Parameter(torch.randn(8))
        self.reads_twice = reads_twice

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, weight=self.qkv.weight, bias=self.own_bias)
        return y * x if self.reads_twice else y


def lending_model(**options) -> Model:
    layers = {"first": nn.Linear(8, 8), "attn": Lending(**options), "last": nn.Linear(8, 4)}
    return Model(lambda m, x: m.last(m.attn(m.first(x).tanh())), **layers)


def test_a_linear_layer_whose_weight_is_lent_becomes_discrete():
    model = lending_model()
    x = torch.randn(16, 8)
    float_logits = model(x)
    plan = quantize(model, x, 2, 4)
    assert [(layer.name, layer.parent) for layer in plan.layers] == [
        ("first", None),
        ("attn.qkv", "attn"),
        ("last", None),
    ]
    assert "linear" not in {kept.kind for kept in plan.kept}
    assert isinstance(model.attn.qkv, QuantLinearWeight)
    calibrate(model, [x])
    seen = []
    model.attn.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    logits = model(x)
    assert len(seen[0].unique()) <= 16
    assert (logits - float_logits).abs().mean() < float_logits.std()
    logits.sum().backward()
    assert model.attn.qkv.latent.grad.abs().sum() > 0
    assert model.attn.qkv.input_quantizer.log_scale.grad.abs() > 0


def test_the_input_of_a_lent_weight_stays_float_if_its_parent_needs_it_otherwise():
    model = lending_model(reads_twice=True)
    plan = plan_conversion(model, torch.randn(4, 8), 2, 4)
    assert [layer.act_bits for layer in plan.layers] == [8, 32, 8]
    assert "elsewhere" in reasons(plan)["attn.qkv"]


def test_a_layer_that_works_on_constants_stays_float():
    table = nn.Linear(2, 3)

    def forward(model, x):
        return model.last(model.conv(x).mean((2, 3)) + model.table(model.coordinates).sum(0))

    model = Model(forward, conv=conv(), table=table, last=nn.Linear(3, 2))
    model.register_buffer("coordinates", torch.randn(5, 2))
    plan = plan_conversion(model, PICTURE, 2, 2)
    assert [layer.name for layer in plan.layers] == ["conv", "last"]
    assert "constants" in reasons(plan)["table"]


def test_convolutions_that_share_a_weight_keep_it_as_it_is():
    layers = {name: nn.Conv2d(3, 4, 1, bias=False) for name in ("a", "b")}
    layers["b"].weight = layers["a"].weight
    norms = {name: nn.BatchNorm2d(4) for name in ("norm_a", "norm_b")}
    norms["norm_a"].weight.data = torch.tensor([1.0, -1.0, 1.0, -1.0])
    norms["norm_b"].weight.data = torch.tensor([1.0, 1.0, -1.0, -1.0])
    model = Model(lambda m, x: m.norm_a(m.a(x)) + m.norm_b(m.b(x)), **layers, **norms).eval()
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    quantize(model, x, 8, 32)
    assert (model(x) - expected).abs().max() < 0.05 * expected.std()


# Rectifiers


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), F.relu, F.relu6])
def test_a_rectifier_between_two_layers_needs_no_point(act):
    model = Model(lambda m, x: m.conv2(act(m.conv1(x))), conv1=conv(), conv2=conv())
    assert plan_conversion(model, PICTURE, 2, 2).points == {}


def test_where_no_module_returns_what_a_rectifier_gives_the_point_stands_before_it():
    def forward(model, x):
        x = F.relu(model.conv1(x))
        return model.conv2(x) + model.conv3(x)

    model = Model(forward, conv1=conv(), conv2=conv(), conv3=conv())
    plan = plan_conversion(model, PICTURE, 2, 2)
    assert "conv1" in plan.points


class TableMadeWhenCalled(nn.Module):
    """As ConViT: a table that the first call makes and keeps, written to in place."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 8, 1)
        self.table = nn.Linear(2, 8)
        self.head = nn.Linear(8, 2)
        self.register_buffer("places", None, persistent=False)

    def forward(self, x):
        if self.places is None:
            self.places = torch.zeros(1, 2)
            self.places[:, 1] = torch.ones(1)
        return self.head(self.inner(x).mean((2, 3)) + self.table(self.places.expand(len(x), -1)))


def test_constants_that_the_first_call_makes_are_known_to_be_constants():
    model = TableMadeWhenCalled().eval()
    plan = plan_conversion(model, torch.zeros(2, 3, 4, 4), 4, 4)
    assert [layer.name for layer in plan.layers] == ["inner", "head"]
    assert "constants" in reasons(plan)["table"]
