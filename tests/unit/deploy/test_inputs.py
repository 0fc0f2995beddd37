"""Files that take uint8 pixels or a fixed batch answer like those that take float images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from ricciq.data.preprocessing import InputType, Preprocessing
from ricciq.deploy.export import export_onnx
from ricciq.deploy.formats.catalog import DEFAULT, FORMATS, Format
from ricciq.deploy.inspection import inspect_onnx
from ricciq.deploy.latency import bench_files, measure_latency
from ricciq.deploy.modules import DeployedActivation
from ricciq.deploy.session import image_input, open_session, session_predictor
from ricciq.errors import DataError, ModelError, UsageError
from ricciq.evaluation import Predict
from ricciq.quant.activation import ActivationQuantizer
from ricciq.workflows.evaluate import evaluate
from ricciq.workflows.saved import onnx_predictor

NORMALIZATIONS = {
    "imagenet": ((3, 16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((3, 16, 16), (0.5,) * 3, (0.5,) * 3),
    "clip": ((3, 16, 20), (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.2613026, 0.2757771)),
    "none": ((3, 16, 16), (0.0,) * 3, (1.0,) * 3),
    "grey, small": ((1, 16, 16), (0.3054,), (0.376,)),
    "grey": ((1, 24, 16), (0.286,), (0.353,)),
}  # fmt: skip
each_normalization = pytest.mark.parametrize(
    "preprocessing", [Preprocessing(*n) for n in NORMALIZATIONS.values()], ids=NORMALIZATIONS
)


class Unchanged(nn.Module):
    """Its logits are its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.one).flatten(1)


def every_pixel(preprocessing: Preprocessing) -> Tensor:
    """Images, (2, C, H, W), whose channels have each of the 256 values, in two orders."""
    channels, height, width = preprocessing.input_size
    order = np.random.default_rng(0)
    images = [
        [np.resize(order.permutation(256), (height, width)) for _ in range(channels)]
        for _ in range(2)
    ]
    return torch.from_numpy(np.array(images).astype(np.uint8))


def normalized(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """As torchvision's ToTensor and Normalize compute it."""
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    return (pixels.float().div(255) - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def predictor(path: Path, optimize: bool = True) -> Predict:
    return session_predictor(open_session(path, optimize=optimize, threads=1), path)


# Pixels


@each_normalization
def test_every_pixel_of_every_channel_is_normalized_as_torch_does_it(
    preprocessing: Preprocessing, tmp_path: Path
) -> None:
    path = export_onnx(Unchanged(), tmp_path / "x.onnx", preprocessing, input_type="uint8")
    pixels = every_pixel(preprocessing)
    expected = normalized(pixels, preprocessing).flatten(1)
    for optimize in (True, False):
        assert torch.equal(predictor(path, optimize)(pixels), expected)


@each_normalization
def test_every_pixel_gets_the_code_that_the_float_file_gives_it(
    preprocessing: Preprocessing, tmp_path: Path
) -> None:
    pixels = every_pixel(preprocessing)
    images = normalized(pixels, preprocessing)
    quantizer, low = ActivationQuantizer(8), images.min().item()
    scale = (images.max().item() - low) / 255
    quantizer.set_range(scale, round(-low / scale))
    model = nn.Sequential(DeployedActivation(quantizer), Unchanged())
    path = export_onnx(model, tmp_path / "x.onnx", preprocessing, input_type="uint8")
    operators = [node.op_type for node in onnx.load(path).graph.node]
    by_table = preprocessing.input_size == (1, 16, 16)
    assert ("QuantizeLinear" in operators) != by_table
    assert ("Gather" in operators) == by_table
    for optimize in (True, False):
        assert torch.equal(predictor(path, optimize)(pixels), model(images))


@pytest.fixture(scope="module")
def tiny_pixels(tiny_preprocessing: Preprocessing) -> Tensor:
    order = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (5, *tiny_preprocessing.input_size), generator=order, dtype=torch.uint8
    )


@pytest.fixture(scope="module")
def pixel_file(
    exported: Any, tiny_preprocessing: Preprocessing, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The two-bit file of the small network, with an input of pixels."""
    path = tmp_path_factory.mktemp("pixels") / "uint8.onnx"
    return export_onnx(exported(2, 2).deployed, path, tiny_preprocessing, input_type="uint8")


@pytest.mark.parametrize("chosen", [*FORMATS, None], ids=[*(f.name for f in FORMATS), "32 bits"])
def test_the_logits_of_every_format_are_those_of_its_float_file(
    chosen: Format | None,
    pixel_file: Path,
    exported: Any,
    tiny_preprocessing: Preprocessing,
    tiny_pixels: Tensor,
    tmp_path: Path,
) -> None:
    given = exported(32, 32) if chosen is None else exported(2, 2)
    usual, path = given.path, pixel_file
    if chosen is not DEFAULT:
        path, model = tmp_path / "uint8.onnx", copy.deepcopy(given.deployed)
        if chosen is not None:
            usual, model = tmp_path / "float.onnx", chosen.apply(model)
            export_onnx(model, usual, tiny_preprocessing)
        export_onnx(model, path, tiny_preprocessing, input_type="uint8")
    images = normalized(tiny_pixels, tiny_preprocessing)
    for optimize in (True, False):
        found = predictor(path, optimize)(tiny_pixels)
        assert torch.equal(found, predictor(usual, optimize)(images))


def test_the_input_is_a_batch_of_images_as_pil_gives_them(pixel_file: Path) -> None:
    (given,) = onnx.load(pixel_file).graph.input
    kind = given.type.tensor_type
    assert (given.name, kind.elem_type) == ("input", onnx.TensorProto.UINT8)
    assert [d.dim_param or d.dim_value for d in kind.shape.dim] == ["batch", 16, 16, 3]
    taken = image_input(open_session(pixel_file), pixel_file)
    assert taken == ("input", (3, 16, 16), "uint8", None)
    assert taken.shape == (16, 16, 3)


def test_layers_are_those_of_the_float_file(pixel_file: Path, exported: Any) -> None:
    found = inspect_onnx(pixel_file)
    assert found.layers == exported(2, 2).inspection.layers
    assert found.metadata is not None
    assert found.metadata["input"] == "uint8"


def test_a_file_of_pixels_is_timed_against_one_of_float_images(
    pixel_file: Path, exported: Any
) -> None:
    found = bench_files(pixel_file, exported(2, 2).path, batch=2, threads=1)
    assert found["ratio"] > 0


def test_normalized_images_become_pixels_again(
    pixel_file: Path, exported: Any, tiny_preprocessing: Preprocessing, tiny_pixels: Tensor
) -> None:
    images = normalized(tiny_pixels, tiny_preprocessing)
    assert torch.equal(onnx_predictor(pixel_file)(images), predictor(pixel_file)(tiny_pixels))
    files = {"usual": exported(2, 2).path, "pixels": pixel_file}
    found = evaluate(files, [(images, torch.zeros(5, dtype=torch.long))])["pixels"]
    assert (found.agreement, found.max_abs_diff) == (100.0, 0.0)
    with pytest.raises(DataError, match="not pixels normalized with mean"):
        onnx_predictor(pixel_file)(images + 0.001)


@pytest.mark.parametrize("shape", [(2, 3, 20, 16), (2, 16, 16, 3), (3, 16, 16)])
def test_pixels_of_another_shape_are_refused(pixel_file: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="does not take images of shape"):
        predictor(pixel_file)(torch.zeros(shape, dtype=torch.uint8))


def test_a_file_without_metadata_takes_pixels_only(pixel_file: Path, tmp_path: Path) -> None:
    model = onnx.load(pixel_file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ModelError, match="its preprocessing is unknown"):
        onnx_predictor(tmp_path / "foreign.onnx")
    assert measure_latency({"foreign": tmp_path / "foreign.onnx"}, rounds=1)


def test_images_of_four_channels_are_refused(tmp_path: Path) -> None:
    preprocessing = Preprocessing((4, 8, 8), (0.5,) * 4, (0.5,) * 4)
    with pytest.raises(UsageError, match="1 or 3 channels, but the model takes 4; give --input"):
        export_onnx(Unchanged(), tmp_path / "x.onnx", preprocessing, input_type="uint8")
    assert list(tmp_path.iterdir()) == []


# Batches


@pytest.mark.parametrize(("input_type", "batch"), [("uint8", 1), ("float", 2)])
def test_a_fixed_batch_answers_any_number_of_images(
    input_type: InputType,
    batch: int,
    exported: Any,
    tiny_preprocessing: Preprocessing,
    tiny_pixels: Tensor,
    tmp_path: Path,
) -> None:
    export, path = exported(2, 2), tmp_path / "x.onnx"
    export_onnx(export.deployed, path, tiny_preprocessing, input_type=input_type, batch=batch)
    graph = onnx.load(path).graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_value == batch
    assert "Shape" not in {node.op_type for node in graph.node}
    images = normalized(tiny_pixels, tiny_preprocessing)
    found = predictor(path)(images if input_type == "float" else tiny_pixels)
    assert torch.equal(found, predictor(export.path)(images))
    with pytest.raises(UsageError, match=f"takes {batch} images in a call, .* --batch {batch}"):
        bench_files(path, None, batch=3, threads=1)
    assert bench_files(path, export.path, batch=batch, threads=1)["ratio"] > 0


@pytest.mark.parametrize("batch", [0, -1, 10**6])
def test_a_batch_that_cannot_be_is_refused(
    batch: int, tiny_preprocessing: Preprocessing, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=rf"--batch {batch} is not .*; give 1 to 174762"):
        export_onnx(Unchanged(), tmp_path / "x.onnx", tiny_preprocessing, batch=batch)
