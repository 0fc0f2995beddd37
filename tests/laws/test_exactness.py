"""Laws of exactness: whatever the network, its file holds torch's codes and computes its numbers.

The networks are drawn at random, the same ones every time. To hunt with more and fresh ones:

    RICCIQ_NETWORKS=150 RICCIQ_LAYERS=5000 pytest tests/laws/test_exactness.py --hypothesis-seed=1
"""

import copy
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torchvision.ops import Permute

from ricciq import calibrate, export_onnx, quantize
from ricciq.convert.rewrite import quantized_layers
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.modules import DeployedActivation, DeployedLayer, deploy
from ricciq.deploy.passes import tidy
from ricciq.layers.base import BIAS_LIMIT, QuantLayer
from ricciq.layers.linear import QuantLinear
from ricciq.layers.registry import kind_of
from ricciq.quant.catalog import ACTIVATIONS, WEIGHTS
from ricciq.quant.config import QuantizerConfig

pytestmark = pytest.mark.slow

Tensors = dict[str, np.ndarray]
FLOAT_NOISE = 1e-5
"""Float32 sums in another order differ by less than this share of what was summed."""
MOST_CHANNELS = 11  # and few are multiples of the codes in a byte


def examples(variable: str, usual: int) -> settings:
    """As many examples as the environment asks for, drawn afresh; else the usual ones, unshrunk."""
    asked = int(os.environ.get(variable, "0"))
    phases = list(Phase) if asked else [Phase.generate]
    often = settings(max_examples=asked or usual, derandomize=not asked, phases=phases)
    return settings(often, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Residual(nn.Module):
    """Two branches, added."""

    def __init__(self, main: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.main, self.skip = main, skip

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.skip(x)


configs = st.builds(QuantizerConfig, st.sampled_from([*WEIGHTS]), st.sampled_from([*ACTIVATIONS]))
weight_widths = st.sampled_from(QuantizerConfig().weight_widths)
activations = st.sampled_from([nn.ReLU6, nn.Identity, nn.ReLU, nn.SiLU, nn.Hardswish, nn.ReLU6])
padded = [nn.Conv2d, nn.Conv2d, StdConv2d, ScaledStdConv2d]  # by what they are given


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convolutions(draw, channels: int, size: tuple[int, int]) -> nn.Conv2d:
    """A convolution of any shape that a picture of (channels, *size) can pass."""
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    rows = groups * draw(st.integers(1, max(1, MOST_CHANNELS // groups)))
    kernel, dilation = draw(pairs(1, 5)), draw(pairs(1, 2))
    one_weight = channels == groups and kernel == (1, 1)  # has no variance to divide by
    kind = nn.Conv2d if one_weight else draw(st.sampled_from([*padded, Conv2dSame, StdConv2dSame]))
    stride: tuple[int, int] = draw(pairs(1, 3))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    least = [max(0, (r - length + 1) // 2) for r, length in zip(reach, size, strict=True)]
    padding: Any = tuple(draw(st.integers(*ends)) for ends in zip(least, reach, strict=True))
    if kind is nn.Conv2d and draw(st.booleans()):
        padding, stride = "same", (1, 1)
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    options |= {"bias": draw(st.booleans())} | ({"padding": padding} if kind in padded else {})
    return kind(channels, rows, kernel, **options)


@st.composite
def sequence_convolutions(draw, channels: int, size: tuple[int]) -> nn.Conv1d:
    """A one-dimensional convolution of any shape that (channels, length) can pass."""
    flat = draw(convolutions(channels, (1, *size)).filter(lambda conv: type(conv) is nn.Conv2d))
    kept = ("kernel_size", "stride", "dilation", "padding")
    options = {name: getattr(flat, name) for name in kept}
    along = {name: o if isinstance(o, str) else o[1] for name, o in options.items()}
    rows = flat.out_channels
    return nn.Conv1d(channels, rows, **along, groups=flat.groups, bias=flat.bias is not None)


@st.composite
def transposed_convolutions(draw, channels: int, size: tuple[int, int]) -> nn.ConvTranspose2d:
    """A transposed convolution of any shape whose output is not empty."""
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    rows = groups * draw(st.integers(1, max(1, MOST_CHANNELS // groups)))
    kernel, dilation, stride = draw(pairs(1, 3)), draw(pairs(1, 2)), draw(pairs(1, 2))
    sides = list(zip(size, kernel, dilation, stride, strict=True))
    most = [((n - 1) * s + d * (k - 1)) // 2 for n, k, d, s in sides]
    padding = tuple(draw(st.integers(0, min(2, end))) for end in most)
    # torch takes as many as the dilation has, too; onnxruntime wants fewer than the stride.
    more = tuple(draw(st.integers(0, s - 1)) for _, _, _, s in sides)
    settings = (kernel, stride, padding, more, groups, draw(st.booleans()), dilation)
    return nn.ConvTranspose2d(channels, rows, *settings)


@st.composite
def stages(draw, channels: int, size: tuple[int, int]) -> nn.Sequential:
    """A convolution, transposed or not, perhaps a BatchNorm, perhaps an activation."""
    drawn = convolutions if max(size) > 20 or draw(st.booleans()) else transposed_convolutions
    convolution = draw(drawn(channels, size))
    kind, rows = draw(activations), convolution.out_channels
    behind = [kind()], [nn.BatchNorm2d(rows), kind()], [BatchNormAct2d(rows, act_layer=kind)]
    return nn.Sequential(convolution, *draw(st.sampled_from(behind)))


def shape_behind(module: nn.Module, *shape: int) -> tuple[int, ...]:
    return tuple(module.eval()(torch.zeros(1, *shape)).shape[1:])


@st.composite
def trunks(draw, channels: int, size: tuple[int, int]) -> nn.Module:
    """A stage, or two branches of equal shape whose outputs are added."""
    main = draw(stages(channels, size))
    if draw(st.booleans()):
        return main
    if shape_behind(main, channels, *size) == (channels, *size):
        return Residual(main, nn.Identity())
    shortcut = copy.deepcopy(main[0])
    shortcut.reset_parameters()
    return Residual(main, shortcut)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Rows of all magnitudes, one in ten of them zero, and BatchNorms of every kind."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            rows = 10 ** torch.empty(len(module.weight)).uniform_(-2, 1)
            rows[1:][torch.rand(len(rows) - 1) < 0.1] = 0
            module.weight *= rows.view(-1, *[1] * (module.weight.dim() - 1))
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            kinds = torch.tensor([0.6, 4.0, -0.7, -3.0, 0.0, 1e-12, -1e-12, 1e-3, 30.0])
            module.weight *= kinds[torch.randint(len(kinds), module.weight.shape)]
            module.bias.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.01, 4)


@torch.no_grad()
def train(model: nn.Module) -> None:
    """What training may do to a calibrated network: other steps, and turned signs in BatchNorms."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("log_scale"):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.4)
        elif name.endswith("norm.weight"):
            parameter.mul_(2 * torch.randint(2, parameter.shape, generator=generator) - 1)


@st.composite
def cases(draw) -> tuple[nn.Module, Tensor, tuple[Any, int, Any, QuantizerConfig], bool]:
    """A network, pictures, what `quantize` is asked for, and whether to train."""
    channels, size = draw(st.integers(1, 5)), draw(pairs(5, 10))
    shape = (channels, *size)
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
        parts: list[nn.Module] = []
        for _ in range(draw(st.integers(1, 3))):
            parts.append(draw(trunks(shape[0], shape[1:])))
            if draw(st.booleans()):
                parts.append(nn.MaxPool2d(3, 2, 1))
            shape = shape_behind(nn.Sequential(*parts), channels, *size)
        parts.append(nn.Flatten(2))
        if draw(st.booleans()):
            convolution = draw(sequence_convolutions(shape[0], (shape[1] * shape[2],)))
            norms = [nn.BatchNorm1d(convolution.out_channels)] if draw(st.booleans()) else []
            parts += [convolution, *norms, draw(activations)()]
            shape = (convolution.out_channels,)
        parts.append(Permute([0, 2, 1]))  # tokens, as in a transformer
        if draw(st.booleans()):
            width = draw(st.integers(1, MOST_CHANNELS))
            parts += [nn.Linear(shape[0], width, bias=draw(st.booleans())), draw(activations)()]
            shape = (width,)
        parts += [Permute([0, 2, 1]), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
        parts.append(nn.Linear(shape[0], draw(st.integers(2, 7)), bias=draw(st.booleans())))
        model = nn.Sequential(*parts).eval()
        randomize(model)
        pictures = 5 * torch.randn(3, channels, *size)  # often beyond the end of a ReLU6
    pictures = pictures.abs() if draw(st.booleans()) else pictures
    config = draw(configs)
    weights = st.sampled_from(config.weight_widths)
    widths = draw(weights), draw(st.integers(1, 8)), draw(weights), config
    return model, pictures, widths, draw(st.booleans())


def export(model: nn.Module, folder: Path, pictures: Tensor) -> Path:
    channels, *size = pictures.shape[1:]
    about = Preprocessing((channels, *size), (0.0,) * channels, (1.0,) * channels)
    return export_onnx(model, folder / "model.onnx", about)


def look_inside(model: onnx.ModelProto, pictures: Tensor) -> Tensors:
    """Every tensor of a file: those stored, and those onnxruntime computes on the way."""
    stored = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    computed = [name for node in model.graph.node for name in node.output]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    values = session.run(computed, {"input": pictures.numpy()})
    return stored | {"input": pictures.numpy()} | dict(zip(computed, values, strict=True))


def same_weights(graph: Any, tensors: Tensors, model: nn.Module) -> None:
    """Every layer's codes and steps are torch's, with the signs of the BatchNorm applied."""
    nodes = {node.name: node for node in graph.node if node.op_type == "DequantizeLinear"}
    layers = quantized_layers(model)
    assert sum(name.count(".weight_quantizer/") for name in nodes) == len(layers)
    for name, layer in layers.items():
        weights = layer.integer_weights()
        signs = torch.where(weights.flip, -1, 1).view(-1, *[1] * (weights.codes.dim() - 1))
        node = nodes[f"{name}.weight_quantizer/DequantizeLinear"]
        codes = weights.codes.int() * signs * weights.stretch
        zeros = [tensors[entry] for entry in node.input[2:]]
        if zeros and zeros[0].any():  # uint8 where int8 would saturate
            assert set(zeros[0].tolist()) == {128}
            codes = (codes + 128).to(torch.uint8)
        else:
            codes = codes.to(torch.int8)
        codes = codes.movedim(0, node.attribute[0].i)
        expected = codes, weights.scale, weights.bias, weights.bias_scale
        entries = [*node.input[:2], *nodes[f"{name}.bias_quantizer/DequantizeLinear"].input]
        for entry, values in zip(entries, expected, strict=True):
            assert tensors[entry].dtype == values.numpy().dtype
            assert np.array_equal(tensors[entry], values.numpy())


@torch.no_grad()
def same_activations(graph: Any, tensors: Tensors, deployed: nn.Module, pictures: Tensor) -> None:
    """Every quantizer in the file is given torch's numbers and rounds its own as torch would.

    So codes differ only where float sums, added up in another order, fall on two sides of a tie.
    Torch goes on with the file's codes: no difference spreads, every number is compared.
    """
    stored = {name: torch.tensor(value) for name, value in tensors.items()}
    readers = {entry: node for node in graph.node for entry in node.input}
    awaited = iter([node for node in graph.node if node.op_type == "QuantizeLinear"])
    seen: dict[Any, tuple[Tensor, Tensor]] = {}
    peak = 0.0  # the largest number since the last quantizer

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ARG001
        nonlocal peak
        peak = max(peak, float(output.abs().max()))

    def close(actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= FLOAT_NOISE * max(peak, expected.abs().max())

    def check(activation: DeployedActivation, args: tuple[Tensor], output: Tensor) -> Tensor:  # noqa: ARG001
        nonlocal peak
        steps = activation.bits, float(activation.scale), int(activation.zero_point)
        kind = (id(args[0]), args[0]._version, *steps)
        if kind in seen:  # the file holds equal quantizers of one value once
            return seen[kind][1]
        node = next(awaited)
        given, scale, zero_point = (stored[entry] for entry in node.input)
        assert (scale, zero_point) == (activation.scale, activation.zero_point)
        while node.op_type != "DequantizeLinear":
            node = readers[node.output[0]]
        codes, values = stored[node.input[0]], stored[node.output[0]]
        assert int(codes.max()) < 2**activation.bits
        if args[0].min() >= 0 and args[0].max() <= 6:  # a ReLU6 may be left to the codes' Clip
            given = given.clamp(0, 6)
        close(given, args[0])
        assert torch.equal(values, activation.forward(given))  # so codes, too: steps are equal
        peak = 0.0
        seen[kind] = args[0], values  # the argument, too, so that nothing else gets its id
        return values

    for module in deployed.modules():
        if isinstance(module, DeployedLayer):
            module.is_integer = False  # without optimizations, a file computes in float
        module.register_forward_hook(check if isinstance(module, DeployedActivation) else watch)
    close(stored["logits"], deployed(pictures))
    assert next(awaited, None) is None


@examples("RICCIQ_NETWORKS", 20)
@given(case=cases())
def test_a_file_holds_the_codes_of_torch_and_computes_its_numbers(case, tmp_path_factory):
    model, pictures, widths, trained = case
    kept = quantize(model, pictures[:1], *widths).kept
    assert not [entry for entry in kept if "Conv" in entry.kind or "Linear" in entry.kind]
    calibrate(model, [pictures])
    if trained:
        train(model)
    deployed = deploy(model)
    file = onnx.load(export(deployed, tmp_path_factory.mktemp("exact"), pictures))
    tensors = look_inside(file, pictures)
    same_weights(file.graph, tensors, model)
    same_activations(file.graph, tensors, deployed, pictures)


@examples("RICCIQ_LAYERS", 200)
@given(st.floats(-7, 0), st.floats(0, 7), st.floats(-6, 1), st.integers(0, 255))
def test_a_clip_of_numbers_chooses_the_codes_of_a_clip_of_codes(low, high, log_scale, zero_point):
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 18]>
        clipped (float[n] input) => (float[n] logits) <
            float low = {{{low:.6f}}}, float high = {{{high:.6f}}},
            float s = {{{math.exp(log_scale):.6f}}}, uint8 z = {{{zero_point}}}> {{
            limited = Clip(input, low, high)
            codes = QuantizeLinear(limited, s, z)
            logits = DequantizeLinear(codes, s, z)
        }}""")
    tidied = ir.to_proto(tidy(ir.from_proto(model), {}))
    assert [n.op_type for n in tidied.graph.node][:2] == ["QuantizeLinear", "Clip"]
    x = torch.linspace(-9, 9, 2001)
    assert np.array_equal(look_inside(tidied, x)["logits"], look_inside(model, x)["logits"])


convolution_kinds = [
    (convolutions, 2, nn.BatchNorm2d),
    (sequence_convolutions, 1, nn.BatchNorm1d),
    (transposed_convolutions, 2, nn.BatchNorm2d),
]


@st.composite
def layers(draw) -> tuple[QuantLayer, Tensor]:
    """A calibrated discrete layer and its inputs, without an export: thousands of them."""
    weight_bits, act_bits = draw(weight_widths), draw(st.integers(1, 8) | st.just(32))
    channels, size = draw(st.integers(1, MOST_CHANNELS)), draw(pairs(2, 7))
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
        if draw(st.booleans()):
            x = torch.randn(2, *draw(st.sampled_from([(), size])), channels)
            linear = nn.Linear(channels, draw(st.integers(1, 9)), bias=draw(st.booleans()))
            randomize(linear)
            layer: QuantLayer = QuantLinear.from_float(linear, weight_bits, act_bits)
        else:
            drawn, axes, norms = draw(st.sampled_from(convolution_kinds))
            x = torch.randn(2, channels, *size[:axes])
            convolution = draw(drawn(channels, size[:axes]))
            norm = norms(convolution.out_channels) if draw(st.booleans()) else None
            randomize(nn.ModuleList([convolution, norm or nn.Identity()]))
            kind = kind_of(convolution)
            layer = kind.from_float(convolution, weight_bits, act_bits, norm)
    x = 10.0 ** draw(st.integers(-4, 3)) * (x.abs() if draw(st.booleans()) else x)
    calibrate(layer, [x])
    train(layer)
    return layer.eval(), x


def summed(layer: QuantLayer, largest: Tensor) -> Tensor:
    """(rows,) a bound on what the layer adds up, in magnitude, from inputs up to ``largest``."""
    weight = layer.weight_quantizer(layer.latent).abs().flatten(1).sum(1)
    total = weight * largest + (0 if layer.bias is None else layer.bias.abs())
    if layer.norm is None:
        return total
    factor = layer.norm.weight.abs() * (layer.norm.running_var + layer.norm.eps).rsqrt()
    return factor * (total + layer.norm.running_mean.abs()) + layer.norm.bias.abs()


@examples("RICCIQ_LAYERS", 400)
@given(drawn=layers())
@torch.no_grad()
def test_a_deployed_layer_differs_from_the_trained_one_by_the_rounding_of_its_bias(drawn):
    layer, x = drawn
    rows = -1 if isinstance(layer, QuantLinear) else 1
    difference = (deploy(nn.Sequential(layer))(x) - layer(x)).movedim(rows, 0).flatten(1)
    largest = (x if layer.input_quantizer is None else layer.input_quantizer(x)).abs().max()
    weights, noise = layer.integer_weights(), FLOAT_NOISE * summed(layer, largest)
    step = torch.zeros(len(noise)) if weights.bias_scale is None else weights.bias_scale
    # A row that is nearly all bias has its codes rounded again, each to within one.
    one = weights.stretch * weights.scale * largest * weights.codes[0].numel()
    noise += one * (weights.bias.abs() > 0.99 * BIAS_LIMIT)
    assert (difference.abs().amax(1) <= step / 2 + noise).all()
    assert (difference.amax(1) - difference.amin(1) <= 2 * noise).all()  # the same everywhere


@pytest.mark.parametrize("weight_bits", [2, 3, "ternary"])
def test_a_file_is_hardly_larger_than_what_it_must_hold(weight_bits, tmp_path):
    torch.manual_seed(0)
    wide = [nn.Conv2d(256, 256, 3) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 256, 3), *wide, nn.Flatten(), nn.Linear(256, 10)).eval()
    pictures = torch.randn(1, 3, 11, 11)
    quantize(model, pictures, weight_bits, 2)
    calibrate(model, [pictures])
    path = export(model, tmp_path, pictures)
    expected = 0.0
    for layer in quantized_layers(model).values():
        bits = 8 / 5 if layer.weight_quantizer.bits == "ternary" else layer.weight_quantizer.bits
        expected += layer.latent.numel() * bits / 8 + 8 * len(layer.latent)
    assert expected <= path.stat().st_size <= 1.03 * expected
