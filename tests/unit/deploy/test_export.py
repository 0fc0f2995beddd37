"""The exported file: its form, its size, and that it computes what torch computes."""

import json
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from ricciq.convert.rewrite import quantize, quantized_layers
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy import export
from ricciq.deploy.export import export_onnx
from ricciq.deploy.inspection import inspect_onnx
from ricciq.deploy.modules import DeployedActivation, DeployedWeight, deploy
from ricciq.deploy.packing import unpack
from ricciq.deploy.session import METADATA_KEY, open_session, session_metadata, session_predictor
from ricciq.errors import RicciqError
from ricciq.layers.base import IntegerWeights
from ricciq.layers.conv import QuantConv2d
from ricciq.layers.linear import QuantLinear
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.calibration import calibrate
from ricciq.quant.grid import UniformGrid

# Every weight width, with activation widths by turns.
WIDTHS = [(1, 2), (2, 2), (3, 4), (4, 4), (5, 2), (6, 4), (7, 2), (8, 4), ("ternary", 2)]
EVERY = [*WIDTHS, (2, 1), (4, 32)]
CODES_A_BYTE = {1: [8], 2: [4], 3: [4, 8], 4: [2], 5: [2, 8], 6: [2, 4], 7: [2, 4, 8], 8: [1]}
CODES_A_BYTE["ternary"] = [5]


def of_exports(widths: Sequence[tuple[Any, int]]) -> pytest.MarkDecorator:
    """Parametrize by widths; an export takes seconds, so the quick tests have one of them."""
    marked = [pytest.param(*w, marks=[pytest.mark.slow] * (w != (2, 2))) for w in widths]
    return pytest.mark.parametrize(("weight_bits", "act_bits"), marked)


each_width, each_export = of_exports(WIDTHS), of_exports([*EVERY, (32, 32)])


def names(made) -> list[str]:
    return [layer.name for layer in made.plan.layers]


def predict(path, images: Tensor, optimize: bool) -> Tensor:
    return session_predictor(open_session(path, optimize=optimize, threads=1), path)(images)


# The form of the file


@each_export
def test_a_file_is_one_valid_model_of_standard_operators(exported, weight_bits, act_bits):
    made = exported(weight_bits, act_bits)
    model = onnx.load(made.path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 18}
    assert model.ir_version == 10
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0
    assert [entry.name for entry in model.graph.input] == ["input"]
    assert [entry.name for entry in model.graph.output] == ["logits"]
    assert os.listdir(made.path.parent) == ["model.onnx"]
    assert not any(tensor.external_data for tensor in model.graph.initializer)


@each_export
def test_a_file_takes_any_batch_and_computes_what_torch_computes(
    exported, pictures, weight_bits, act_bits
):
    made = exported(weight_bits, act_bits)
    with torch.no_grad():
        expected = made.deployed(pictures)
    for batch in (pictures[:1], pictures[3:8], pictures):
        logits = predict(made.path, batch, optimize=False)
        start = 3 if len(batch) == 5 else 0
        torch.testing.assert_close(
            logits, expected[start : start + len(batch)], rtol=1e-4, atol=1e-4
        )
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    assert expected.std(0).min() > 0  # the pictures are told apart


@each_export
def test_optimizations_hardly_change_the_logits(exported, pictures, weight_bits, act_bits):
    made = exported(weight_bits, act_bits)
    plain = predict(made.path, pictures, optimize=False)
    optimized = predict(made.path, pictures, optimize=True)
    assert (plain - optimized).abs().mean() < 0.02 * plain.std()
    assert (plain.argmax(1) == optimized.argmax(1)).float().mean() >= 0.9


@each_export
def test_metadata_holds_all_a_deployer_needs(exported, tiny_preprocessing, weight_bits, act_bits):
    path = exported(weight_bits, act_bits).path
    stored = session_metadata(open_session(path), path)
    assert Preprocessing.from_dict(stored["preprocessing"]) == tiny_preprocessing
    assert stored["recipe"] == {"model": "tiny"}
    (entry,) = onnx.load(path).metadata_props
    assert entry.key == METADATA_KEY
    assert json.loads(entry.value) == stored


# Integer kernels


@each_width
def test_every_layer_runs_in_integers(exported, weight_bits, act_bits):
    made = exported(weight_bits, act_bits)
    found = made.inspection
    assert found.fused_share() == 100
    assert found.fused_share("Gemm") == 100
    assert all(row.fused for row in found.layers)
    assert [row.name for row in found.layers] == names(made)
    assert [row.operator for row in found.layers] == ["Conv"] * 5 + ["Gemm"]
    assert found.runtime_operators["QLinearConv"] == 5
    assert "Conv" not in found.runtime_operators
    assert "Gemm" not in found.runtime_operators


@of_exports(EVERY)
def test_an_inspection_tells_the_widths_of_the_plan(exported, weight_bits, act_bits):
    made = exported(weight_bits, act_bits)
    rows = {row.name: (row.weight_bits, row.act_bits) for row in made.inspection.layers}
    assert rows == {layer.name: (layer.weight_bits, layer.act_bits) for layer in made.plan.layers}
    shapes = {row.name: row.shape for row in made.inspection.layers}
    for name, layer in quantized_layers(made.model).items():
        assert sorted(shapes[name]) == sorted(layer.weight.shape)
    assert made.inspection.file_bytes == made.path.stat().st_size


def test_a_float_file_is_inspected_as_float(exported):
    made = exported(32, 32)
    rows = made.inspection.layers
    assert [(r.weight_bits, r.act_bits, r.fused) for r in rows] == [(32, 32, False)] * 6
    assert made.inspection.fused_share() == 0


def test_float_activations_leave_the_kernels_float(exported):
    made = exported(4, 32)
    assert not any(row.fused for row in made.inspection.layers)
    operators = {node.op_type for node in onnx.load(made.path).graph.node}
    assert "QuantizeLinear" not in operators


# Packed weights


def layer_node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (node,) = [n for n in model.graph.node if n.name in (f"{name}/Conv", f"{name}/Gemm")]
    return node


def codes_in_file(path, layers: list[str]) -> dict[str, np.ndarray]:
    """The codes that each layer's weight is dequantized from, as onnxruntime unpacks them."""
    model = onnx.load(path)
    made_by = {output: node for node in model.graph.node for output in node.output}
    entries, zero_points = {}, {}
    for name in layers:
        node = made_by[layer_node(model, name).input[1]]
        while node.op_type != "DequantizeLinear":
            node = made_by[node.input[0]]
        entries[name], zero_points[name] = node.input[0], node.input[2:]
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    computed = [entry for entry in entries.values() if entry not in stored]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(entry, onnx.TensorProto.INT8, None) for entry in computed
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    feed = {"input": np.zeros((1, 3, 16, 16), np.float32)}
    stored |= dict(zip(computed, session.run(computed, feed) if computed else [], strict=True))
    found = {}
    for name, entry in entries.items():
        (zero,) = {int(n) for value in zero_points[name] for n in stored[value]} or {0}
        assert zero == (128 if stored[entry].dtype == np.uint8 else 0)
        found[name] = stored[entry].astype(int) - zero
    return found


@each_width
def test_the_file_holds_the_codes_of_torch(exported, weight_bits, act_bits):
    made = exported(weight_bits, act_bits)
    codes = codes_in_file(made.path, names(made))
    for name, layer in quantized_layers(made.model).items():
        weights = layer.integer_weights()
        expected = weights.codes.int() * weights.stretch
        expected[weights.flip] *= -1
        if isinstance(layer, QuantLinear):
            expected = expected.t()
        assert torch.equal(torch.tensor(codes[name]).int(), expected)
        deployed = made.deployed.get_submodule(name).weight_quantizer
        assert torch.equal(deployed.integer_codes().int(), expected)


@pytest.mark.parametrize("highest", [0, 15, 128, 129, 255])
@pytest.mark.parametrize(("bits", "largest"), [(7, 63), (7, 127), (8, 64), (8, 127)])
def test_no_two_products_exceed_int16(bits, highest, largest):
    """Where int8 codes could, they are uint8."""
    weight = torch.tensor([[1.0, largest], [-largest, 3.0]])
    grid = UniformGrid.for_weights(bits, odd=bits == 7)
    quantizer = SimpleNamespace(bits=bits, grid=grid)
    codes, one = weight.to(torch.int8), torch.ones(2)
    given = IntegerWeights(codes, 1, one < 0, one, torch.zeros(2), None)
    deployed = DeployedWeight(given, quantizer, highest=highest)
    kernel_codes = deployed.integer_codes()
    saturates = 2 * highest * largest > 2**15 - 1
    assert (deployed.offset is not None) == saturates
    assert torch.equal(kernel_codes.float(), weight)
    assert torch.equal(deployed.value(), weight)


@each_width
def test_ordinary_rows_keep_the_codes_of_training(exported, weight_bits, act_bits):
    made = exported(weight_bits, act_bits)
    flipped = 0
    for name, layer in quantized_layers(made.model).items():
        codes = made.deployed.get_submodule(name).weight_quantizer.integer_codes().int()
        trained = layer.weight_quantizer.codes(layer.weight).int()
        trained *= layer.integer_weights().stretch
        if isinstance(layer, QuantLinear):
            trained = trained.t()
        if layer.norm is not None:
            trained[layer.norm.weight < 0] *= -1
            flipped += int((layer.norm.weight < 0).sum())
            ordinary = layer.norm.weight.abs() > 1e-6
            codes, trained = codes[ordinary], trained[ordinary]
        assert torch.equal(codes, trained)
    assert flipped > 5


@each_width
def test_packed_bytes_are_as_few_as_promised(exported, weight_bits, act_bits):
    made = exported(weight_bits, act_bits)
    for layer in made.plan.layers:
        packed = made.deployed.get_submodule(layer.name).weight_quantizer
        count = made.model.get_submodule(layer.name).weight.numel()
        expected = sum(-(-count // n) for n in CODES_A_BYTE[layer.weight_bits])
        held = [b for n, b in packed.named_buffers() if n.startswith(("packed", "codes"))]
        assert sum(b.numel() * b.element_size() for b in held) == expected
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(made.path).graph.initializer}
    # No initializer in the file is a float weight or an unpacked copy.
    inner = [x for x in stored.values() if x.dtype != np.uint8 and x.shape[:1] != (256,)]
    largest = max(made.model.get_submodule(n).weight.numel() for n in ("conv1", "fc"))
    if weight_bits != 8:
        assert all(x.size <= largest for x in inner)
    planes = [
        x
        for x in stored.values()
        if x.dtype == np.uint8 and x.ndim == 1 and not (x == 128).all()  # zero points
    ]
    inside = [layer for layer in made.plan.layers if layer.weight_bits != 8]
    promised = sum(
        -(-made.model.get_submodule(layer.name).weight.numel() // n)
        for layer in inside
        for n in CODES_A_BYTE[layer.weight_bits]
    )
    assert sum(x.size for x in planes) == promised


@each_width
def test_equal_lookup_tables_are_stored_once(exported, weight_bits, act_bits):
    stored = onnx.load(exported(weight_bits, act_bits).path).graph.initializer
    tables = [i.dims[1] for i in stored if len(i.dims) == 2 and i.dims[0] == 256]
    assert tables == ([] if weight_bits == 8 else CODES_A_BYTE[weight_bits])


# Signed activations and points


@each_width
def test_signed_inputs_have_a_zero_point_inside_the_codes(exported, weight_bits, act_bits):
    made = exported(weight_bits, act_bits)
    zero_points = {
        name: int(layer.input_quantizer.zero_point)
        for name, layer in quantized_layers(made.model).items()
    }
    assert zero_points["conv1"] > 0  # pictures
    assert 0 < zero_points["conv4"] < 2**act_bits  # a sum without a ReLU
    assert zero_points["conv3"] == zero_points["grouped"] == zero_points["fc"] == 0


def integer_steps(x: Tensor, point: DeployedActivation) -> Tensor:
    return (x / point.scale).round() + point.zero_point


@pytest.mark.parametrize(("bits", "zero_point"), [(1, 0), (2, 1), (4, 7), (8, 0), (8, 128)])
def test_a_deployed_activation_computes_what_training_computes(bits, zero_point):
    quantizer = ActivationQuantizer(bits)
    quantizer.set_range(0.13, zero_point)
    x = 4 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    deployed = DeployedActivation(quantizer)
    torch.testing.assert_close(deployed(x), quantizer(x).detach())
    codes = integer_steps(deployed(x), deployed)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1


# Deploying


@each_width
def test_a_deployed_model_computes_what_the_trained_one_computes(
    exported, pictures, weight_bits, act_bits
):
    made = exported(weight_bits, act_bits)
    with torch.no_grad():
        expected, deployed = made.model.eval()(pictures), made.deployed(pictures)
    # The bias is rounded, so a few activations may fall to the neighbouring code.
    assert (deployed - expected).abs().mean() < 0.02 * expected.std()
    assert (deployed.argmax(1) == expected.argmax(1)).float().mean() >= 0.9


def test_deploying_leaves_the_model_as_it_was(tiny_quantized, pictures):
    model, _ = tiny_quantized(2, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(pictures)
    deployed = deploy(model.train())
    assert model.training
    assert not deployed.training
    assert not list(deployed.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(model.eval()(pictures), expected)


def test_deployed_layers_say_what_models_ask_of_layers(tiny_quantized):
    # DaViT pads by its convolution's kernel size.
    model, _ = tiny_quantized(2, 2)
    deployed = deploy(model)
    asked = {
        QuantConv2d: "in_channels out_channels kernel_size stride padding dilation groups",
        QuantLinear: "in_features out_features",
    }
    for name, layer in quantized_layers(model).items():
        for attribute in asked[type(layer)].split():
            expected = getattr(layer, attribute)
            assert getattr(deployed.get_submodule(name), attribute) == expected


def test_a_shared_point_has_one_grid(tiny_quantized):
    model, plan = tiny_quantized(2, 2)
    assert plan.points["pool"] == "act1"
    deployed = deploy(model)
    first, other = deployed.act1.output_quantizer, deployed.pool.output_quantizer
    # One reads the other, so in torch they are two.
    assert first is not other
    assert isinstance(other, DeployedActivation)
    assert first.scale == other.scale == model.act1.output_quantizer.scale
    assert first.zero_point == other.zero_point


def test_layers_that_share_an_input_quantizer_share_it_when_deployed(tiny_quantized):
    model, _ = tiny_quantized(2, 2)
    layers = list(quantized_layers(model))
    model.get_submodule(layers[2]).input_quantizer = model.get_submodule(layers[1]).input_quantizer
    deployed = deploy(model)
    first, other = (deployed.get_submodule(name).input_quantizer for name in layers[1:3])
    assert first is other


@pytest.mark.parametrize("bits", [2, 7, "ternary"])
def test_a_deployed_weight_is_codes_times_steps(bits):
    torch.manual_seed(0)
    layer = QuantLinear.from_float(nn.Linear(7, 5), bits, 32)
    weights = layer.integer_weights()
    held = DeployedWeight(weights, layer.weight_quantizer)
    torch.testing.assert_close(held(), layer.weight_quantizer(layer.weight).detach())
    planes = held._plane_list()
    assert torch.equal(unpack(planes, 35).view(5, 7), weights.codes.int() * weights.stretch)


# What may go wrong


@pytest.fixture
def linear_export(tiny_preprocessing) -> Callable:
    """Exports the smallest model there is."""

    def run(path):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
        return export_onnx(model, path, tiny_preprocessing)

    return run


def test_a_file_is_exported_if_it_is_whole_and_has_the_metadata(linear_export, tmp_path):
    path = tmp_path / "model.onnx"
    assert not export.is_exported(path, {})
    linear_export(path)
    stored = session_metadata(open_session(path), path)
    assert export.is_exported(path, stored)
    assert export.is_exported(path, {})
    assert not export.is_exported(path, {**stored, "bits": "others"})
    path.write_bytes(path.read_bytes()[:-9])
    assert not export.is_exported(path, stored)


def test_a_missing_folder_gets_no_file(linear_export, tmp_path):
    with pytest.raises(RicciqError, match="cannot write"):
        linear_export(tmp_path / "missing" / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def interrupt(model, path, **options) -> None:  # noqa: ARG001
    """Stands in for writing a file: half of it, then the user stops the program."""
    path.write_bytes(b"half a file")
    raise KeyboardInterrupt


@pytest.mark.parametrize("existing", [None, b"an older export"])
def test_an_interrupted_export_is_no_export(linear_export, tmp_path, monkeypatch, existing):
    path = tmp_path / "model.onnx"
    if existing is not None:
        path.write_bytes(existing)
    monkeypatch.setattr(export.ir, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        linear_export(path)
    assert (path.read_bytes() if path.exists() else None) == existing


def test_an_interrupted_export_leaves_nothing_behind(linear_export, tmp_path, monkeypatch):
    monkeypatch.setattr(export.ir, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        linear_export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_an_older_file(linear_export, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"an older export")
    assert linear_export(path) == path
    assert predict(path, torch.zeros(4, 3, 16, 16), optimize=True).shape == (4, 2)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_resnet18_at_two_bits_is_small_and_fused_throughout(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet18").eval()
    preprocessing = Preprocessing((3, 64, 64), (0.0,) * 3, (1.0,) * 3)
    pictures = torch.randn(2, 3, 64, 64)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    quantize(model, pictures, 2, 2)
    calibrate(model, [pictures])
    for module in model.modules():  # training makes scales of the same tensor differ
        if isinstance(module, ActivationQuantizer):
            module.log_scale.data.add_(0.1 * torch.rand(()))
    low = export.export_onnx(model, tmp_path / "low.onnx", preprocessing)  # deploys by itself
    assert low.stat().st_size <= 0.08 * 4 * parameters
    inspection = inspect_onnx(low)
    assert len(inspection.layers) == 21
    assert all(layer.fused for layer in inspection.layers)
    assert inspection.runtime_operators["QLinearAdd"] == 8
    assert "Add" not in inspection.runtime_operators
