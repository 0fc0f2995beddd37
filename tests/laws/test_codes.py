"""Every code of every layer: torch computes what onnxruntime's integer kernels compute."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from kernels import kernels_are_known
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from ricciq.convert.plan import plan_conversion
from ricciq.convert.rewrite import convert
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.export import export_onnx
from ricciq.deploy.links import link
from ricciq.deploy.modules import DeployedActivation, deploy
from ricciq.quant.calibration import calibrate

pytestmark = pytest.mark.slow

SIDE = 64
PREPROCESSING = Preprocessing((3, SIDE, SIDE), (0.5,) * 3, (0.5,) * 3)
NETWORKS = ("resnet18", "mobilenetv2_100", "tf_efficientnet_lite0", "regnetx_002")


@pytest.fixture(scope="module")
def crops() -> Tensor:
    """64 crops of two photographs, normalized."""
    random = np.random.default_rng(0)
    found = []
    for number in range(64):
        photograph = load_sample_images().images[number % 2]
        top, left = (int(random.integers(0, n - 2 * SIDE)) for n in photograph.shape[:2])
        found.append(photograph[top : top + 2 * SIDE : 2, left : left + 2 * SIDE : 2])
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def float_network(name: str, images: Tensor) -> nn.Module:
    """Random weights; BatchNorms of both signs, with the statistics of the images."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of all that is shown
            nn.init.normal_(module.weight, 1, 0.4)
            nn.init.normal_(module.bias, 0, 0.3)
    model.train()(images)
    return model.eval()


def codes_in_torch(deployed: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The codes of each quantizer, by name, and the logits."""
    found: dict[str, Tensor] = {}
    for name, module in deployed.named_modules():
        if isinstance(module, DeployedActivation):

            def noted(x: Tensor, name: str = name, quantize: object = module.quantize) -> object:
                codes = quantize(x)  # type: ignore[operator]
                found[name] = codes.values
                return codes

            module.quantize = noted  # type: ignore[method-assign]
    with torch.no_grad():
        return found, deployed(images)


def codes_in_file(path: Path, images: Tensor) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The same of a file, as onnxruntime runs it by default."""
    model = onnx.load(path)
    clipped = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Clip"}
    shown = {
        node.name.split("/")[0]: clipped.get(node.output[0], node.output[0])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.name.endswith("/QuantizeLinear")
    }
    for value in shown.values():
        info = onnx.helper.make_tensor_value_info(value, onnx.TensorProto.UINT8, None)
        model.graph.output.append(info)
    session = ort.InferenceSession(model.SerializeToString())
    logits, *codes = session.run(None, {"input": images.numpy()})
    return dict(zip(shown, codes, strict=True)), logits


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_code_differs(name: str, bits: int, crops: Tensor, tmp_path: Path) -> None:
    model = float_network(name, crops)
    plan = plan_conversion(model, crops[:1], bits, bits)
    converted = convert(copy.deepcopy(model), plan)
    calibrate(converted, [crops])
    deployed = deploy(converted)
    path = export_onnx(deployed, tmp_path / "model.onnx", PREPROCESSING)
    joined = link(deployed, (3, SIDE, SIDE))
    assert joined.float_from is None
    in_torch, logits = codes_in_torch(joined.model, crops)
    in_file, logits_of_file = codes_in_file(path, crops)
    layers = [f"{layer.name}.input_quantizer" for layer in plan.layers]
    compared, same = 0, torch.ones(len(crops), dtype=torch.bool)
    for quantizer, codes in in_file.items():
        if codes.shape == in_torch[quantizer].shape:  # behind pooling, the same name comes again
            same &= (torch.from_numpy(codes) == in_torch[quantizer]).flatten(1).all(1)
            compared += quantizer in layers
    assert compared > 0.6 * len(layers)  # layers share quantizers
    same &= (torch.from_numpy(logits_of_file) == logits).all(1)
    assert same.float().mean() >= (1 if kernels_are_known() else 0.5)
    assert len(np.unique(logits_of_file)) > 100
