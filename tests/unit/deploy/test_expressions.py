"""Constants that a file computes when it is loaded."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from ricciq.convert.rewrite import quantize, quantized_layers
from ricciq.deploy.export import export_onnx
from ricciq.deploy.expressions import Expression, Operators, replace_placeholders
from ricciq.deploy.modules import DeployedWeight, deploy


class Double(Expression):
    """A vector times two."""

    def __init__(self, numbers: list[float]) -> None:
        super().__init__([len(numbers)], torch.device("cpu"))
        self.register_buffer("numbers", torch.tensor(numbers))

    def value(self) -> Tensor:
        return self.numbers + self.numbers

    def write(self, operators: Operators) -> ir.Value:
        stored = operators.buffer("numbers")
        same = operators.add("Reshape", [stored, operators.integers(-1)])
        return operators.add("Add", [same, stored])


class Twice(nn.Module):
    """Reads two constants, one of them in two places and under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Double([1.0, 2.0]), Double([3.0, 5.0])
        self.alias = self.first
        self.unread = Double([7.0])

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.first()) * self.second() + self.alias()


def test_operators_take_the_place_of_placeholders():
    model, x = Twice().eval(), torch.randn(3, 2)
    program = torch.onnx.export(model, (x,), dynamo=True, optimize=False, verbose=False)
    replace_placeholders(program.model.graph, model)
    operators = [node.op_type for node in program.model.graph]
    assert operators == ["Reshape", "Add", "Add", "Reshape", "Add", "Mul", "Add"]
    assert "[-1]" in program.model.graph.initializers
    assert not [name for name in program.model.graph.initializers if "placeholder" in name]
    session = ort.InferenceSession(ir.to_proto(program.model).SerializeToString())
    (given,) = session.get_inputs()
    (found,) = session.run(None, {given.name: x.numpy()})
    assert np.array_equal(found, model(x).numpy())


@pytest.mark.parametrize("bits", [2, 8])
def test_a_placeholder_takes_no_memory(bits):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten(), nn.Linear(64 * 36, 10)).eval()
    quantize(model, torch.randn(1, 3, 8, 8), bits, 8)
    for module in deploy(model).modules():
        if isinstance(module, Expression):
            assert module.placeholder.shape == module.value().shape
            assert module.placeholder.untyped_storage().nbytes() == 4


def test_a_deployed_layer_shows_its_weight_and_bias_as_numbers(tiny_quantized):
    model, _ = tiny_quantized(2, 2)
    deployed = deploy(model)
    for name, layer in quantized_layers(model).items():
        weights, shown = layer.integer_weights(), deployed.get_submodule(name)
        assert isinstance(shown.weight_quantizer, DeployedWeight)
        assert shown.weight.shape == layer.latent.shape
        torch.testing.assert_close(shown.bias, weights.bias * weights.bias_scale)


@pytest.mark.parametrize("fails", [False, True])
def test_an_export_leaves_activations_in_place_as_they_were(
    fails, tiny_preprocessing, tmp_path, monkeypatch
):
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.Hardswish(inplace=True), nn.ReLU())

    def export(exported: nn.Module, *_: object, **__: object) -> None:
        assert not exported[2].inplace
        raise KeyboardInterrupt

    if fails:
        monkeypatch.setattr(torch.onnx, "export", export)
        with pytest.raises(KeyboardInterrupt):
            export_onnx(model, tmp_path / "x.onnx", tiny_preprocessing)
    else:
        export_onnx(model, tmp_path / "x.onnx", tiny_preprocessing)
    assert [model[2].inplace, model[3].inplace] == [True, False]


class Unused(nn.Module):
    """Changes its input in place, and ignores what the activation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)
        self.placeholder = nn.Parameter(torch.ones(4))  # as the buffers of expressions are called

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.act(x)
        return x.mean((2, 3)) + self.placeholder


def test_an_activation_in_place_whose_result_is_unused_stays(
    tiny_preprocessing, pictures, tmp_path
):
    torch.manual_seed(0)
    model = Unused().eval()
    path = export_onnx(model, tmp_path / "x.onnx", tiny_preprocessing)
    (found,) = ort.InferenceSession(path).run(None, {"input": pictures.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(pictures))
    assert model.act.inplace
