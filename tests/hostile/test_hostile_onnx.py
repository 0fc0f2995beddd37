"""ONNX files that are damaged, foreign or hostile: one sentence, exit code 3, nothing else read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from timm.models import register_model
from torch import Tensor, nn

from ricciq.deploy.session import METADATA_KEY

pytestmark = [pytest.mark.hostile, pytest.mark.slow]

CLASSES = [str(number) for number in range(10)]
PREPROCESSING = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5]}
METADATA = {"preprocessing": PREPROCESSING, "class_names": CLASSES}

# The command lines that open a file; the good one comes first where there are two.
EVALUATIONS = {
    "eval": "eval {file} --data digits",
    "reference": "eval {good} --data digits --reference {file}",
}
BENCHES = {"bench": "bench {file}", "against": "bench {good} --against {file}"}
EVERY = {**EVALUATIONS, **BENCHES, "inspect": "inspect {file}"}

Make = Callable[[Path], object]
Value = onnx.ValueInfoProto


def tensor(name: str, kind: int = TensorProto.FLOAT, shape: Any = ("batch", 1, 8, 8)) -> Value:
    return helper.make_tensor_value_info(name, kind, shape)


def node(operator: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), output.split(), **attributes)


def weights(shape: tuple[int, ...] = (64, 10), name: str = "w") -> TensorProto:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


CLASSIFIER = [node("Flatten", "input", "flat"), node("MatMul", "flat w", "logits")]
PIXELS = [node("Cast", "input", "real", to=1), node("Flatten", "real", "flat"), CLASSIFIER[1]]


def save(
    path: Path,
    nodes: list[onnx.NodeProto] = CLASSIFIER,
    constants: list[TensorProto] | None = None,
    *,
    inputs: list[Value] | None = None,
    outputs: list[Value] | None = None,
    opset: int = 18,
    ir_version: int = 10,
    metadata: object = METADATA,
) -> onnx.ModelProto:
    """Write a model, by default a valid one with random weights for digits."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [tensor("input")] if inputs is None else inputs,
        [tensor("logits", shape=None)] if outputs is None else outputs,
        [weights()] if constants is None else constants,
    )
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("acme.ai", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=ir_version)
    if metadata is not None:
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        helper.set_model_props(model, {METADATA_KEY: text})
    path.write_bytes(model.SerializeToString())
    return model


class Answer(command.Answer):
    """The result of a command line, including what C++ wrote to its streams."""

    def refuses(self, *words: str) -> None:
        """Exit code 3 and one sentence with these words and a remedy after its semicolon."""
        assert self.code == 3, self.err
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("ricciq: ")
        assert "; " in line
        assert "Traceback" not in line
        assert "/onnxruntime_src/" not in line
        assert len(line) < 600
        for word in words:
            assert word in line


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file."""
    path = tmp_path_factory.mktemp("good") / "good.onnx"
    save(path)
    return path


@pytest.fixture
def ricciq(capfd: pytest.CaptureFixture[str], tmp_path: Path, good: Path) -> Callable[..., Answer]:
    """Run a command line on model.onnx in a folder with nothing else."""
    (tmp_path / "folder").mkdir()

    def call(line: str, *more: str) -> Answer:
        file = tmp_path / "folder" / "model.onnx"
        answer = command.ricciq(*line.format(file=file, good=good).split(), *more)
        out, err = capfd.readouterr()
        return Answer(answer.code, answer.out + out, answer.err + err)

    return call


@pytest.fixture
def file(tmp_path: Path, ricciq: Callable[..., Answer]) -> Path:  # noqa: ARG001
    return tmp_path / "folder" / "model.onnx"


each = pytest.mark.parametrize("line", EVERY.values(), ids=EVERY)
each_evaluation = pytest.mark.parametrize("line", EVALUATIONS.values(), ids=EVALUATIONS)
each_other = pytest.mark.parametrize(
    "line", [*BENCHES.values(), EVERY["inspect"]], ids=[*BENCHES, "inspect"]
)


@each
def test_a_file_with_nothing_wrong_is_used(
    ricciq: Callable[..., Answer], file: Path, line: str
) -> None:
    save(file)
    answer = ricciq(line, "--json")
    assert answer.code == 0, answer.err
    assert answer.err == ""
    assert isinstance(json.loads(answer.out), dict)


@pytest.mark.parametrize("batch", ["batch", 7])
@each
def test_a_file_of_pixels_is_used(
    ricciq: Callable[..., Answer], file: Path, line: str, batch: str | int
) -> None:
    pixels = tensor("input", TensorProto.UINT8, (batch, 8, 8, 1))
    save(file, PIXELS, inputs=[pixels], metadata={**METADATA, "input": "uint8"})
    options = ["--batch", "7"] if line in BENCHES.values() else []
    answer = ricciq(line, "--json", *options)
    assert answer.code == 0, answer.err
    assert answer.err == ""
    assert isinstance(json.loads(answer.out), dict)


@each_evaluation
def test_pixels_that_the_metadata_do_not_know_of(
    ricciq: Callable[..., Answer], file: Path, line: str
) -> None:
    save(file, PIXELS, inputs=[tensor("input", TensorProto.UINT8, ("batch", 8, 8, 1))])
    ricciq(line, "--json").refuses(str(file), "float images of (1, 8, 8)", "`ricciq export`")


# Files that are no model


def part(share: float) -> Make:
    def make(path: Path) -> None:
        save(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return make


def content(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


def in_no_utf8(path: Path) -> None:
    save(path)
    path.write_bytes(path.read_bytes().replace(b"logits", b"log\xff\xfes"))


NO_MODELS: dict[str, Make] = {
    "names that are no text": in_no_utf8,
    "missing": lambda _: None,
    "a folder": Path.mkdir,
    "empty": content(b""),
    "a quarter": part(0.25),
    "all but the end": part(0.99),
    "random": content(np.random.default_rng(0).bytes(5000)),
    "text": content(b"not a model\nat all\n" * 9),
    "zeros": content(bytes(500)),
    "no graph": content(onnx.ModelProto(ir_version=10).SerializeToString()),
}


@each
@pytest.mark.parametrize("make", NO_MODELS.values(), ids=NO_MODELS)
def test_files_that_are_no_model(
    ricciq: Callable[..., Answer], file: Path, make: Make, line: str
) -> None:
    make(file)
    ricciq(line, "--json").refuses(str(file))


# Models onnxruntime does not know


def huge(*shape: int) -> TensorProto:
    return TensorProto(name="w", data_type=TensorProto.FLOAT, dims=shape)


UNKNOWN: dict[str, tuple[Make, str]] = {
    "foreign operator": (
        lambda path: save(path, [node("Magic", "input", "logits", domain="acme.ai")]),
        "acme.ai:Magic",
    ),
    "unknown operator": (lambda path: save(path, [node("Magic", "input", "logits")]), "Magic"),
    "opset": (lambda path: save(path, opset=99), "99"),
    "IR version": (lambda path: save(path, ir_version=99), "99"),
    "cycle": (
        lambda path: save(path, [node("Add", "input y", "logits"), node("Relu", "logits", "y")]),
        "acyclic",
    ),
    "dangling": (lambda path: save(path, [node("Relu", "nothing", "logits")]), "nothing"),
    "weights of another shape": (lambda path: save(path, constants=[weights((7, 10))]), "MatMul"),
    "12 TB": (lambda path: save(path, constants=[huge(2**40, 3)]), f"[{2**40}, 3]"),
    "beyond all numbers": (lambda path: save(path, constants=[huge(*[2**62] * 8)]), f"{2**62}"),
    "1 GB": (lambda path: save(path, constants=[huge(2**28, 1)]), f"[{2**28}, 1]"),
    "negative": (lambda path: save(path, constants=[huge(-64, 10)]), "[-64, 10]"),
}


@each
@pytest.mark.parametrize(("make", "word"), UNKNOWN.values(), ids=UNKNOWN)
def test_models_the_runtime_does_not_take(
    ricciq: Callable[..., Answer], file: Path, make: Make, word: str, line: str
) -> None:
    make(file)
    ricciq(line, "--json").refuses(str(file), word)


# External data


def outside(*locations: str, offset: object = 0, length: object = 2560) -> TensorProto:
    """The weights, in another file."""
    made = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=(64, 10), data_location=TensorProto.EXTERNAL
    )
    for location in locations:
        made.external_data.add(key="location", value=location)
    made.external_data.add(key="offset", value=str(offset))
    made.external_data.add(key="length", value=str(length))
    return made


def in_attribute(path: Path, data: TensorProto) -> None:
    save(path, [node("Constant", "", "w", value=data), *CLASSIFIER], [])


def in_subgraph(path: Path, data: TensorProto) -> None:
    data.name = "inner"
    branch = helper.make_graph(
        [node("Identity", "inner", "w_inner")],
        "branch",
        [],
        [tensor("w_inner", shape=None)],
        [data],
    )
    choice = node("If", "yes", "w", then_branch=branch, else_branch=branch)
    yes = numpy_helper.from_array(np.array(True), "yes")
    save(path, [choice, *CLASSIFIER], [yes])


def in_sparse(path: Path, data: TensorProto) -> None:
    model = save(path, constants=[])
    data.dims[:] = [640]
    places = numpy_helper.from_array(np.arange(640), "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(data, places, [64, 10]))
    path.write_bytes(model.SerializeToString())


PLACES: dict[str, Callable[[Path, TensorProto], object]] = {
    "initializer": lambda path, data: save(path, constants=[data]),
    "attribute": in_attribute,
    "subgraph": in_subgraph,
    "sparse initializer": in_sparse,
}


@pytest.fixture
def secret(tmp_path: Path, file: Path) -> Path:
    """A file outside the model's folder that could be its weights, and a link to it inside."""
    path = tmp_path / "secret"
    path.write_bytes(weights().raw_data)
    (file.parent / "link").symlink_to(path)
    (file.parent / "linked").symlink_to(tmp_path)
    return path


@pytest.fixture
def nothing_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if onnxruntime or onnx_ir opens a file."""

    session = ort.InferenceSession

    def guarded(path: str, *arguments: Any, **options: Any) -> ort.InferenceSession:
        if not path.endswith("good.onnx"):
            pytest.fail(f"onnxruntime opened {path}")
        return session(path, *arguments, **options)

    def load(path: str, *_: object) -> None:
        pytest.fail(f"onnx_ir opened {path}")

    monkeypatch.setattr(ort, "InferenceSession", guarded)
    monkeypatch.setattr(onnx_ir, "load", load)


@each
@pytest.mark.usefixtures("nothing_opens")
@pytest.mark.parametrize(
    "location",
    ["../secret", "sub/../../secret", "{absolute}", "link", "linked/secret", "", ".", "..", "a\0b"],
)
def test_external_data_outside_the_folder_are_not_read(
    ricciq: Callable[..., Answer], file: Path, secret: Path, location: str, line: str
) -> None:
    save(file, constants=[outside(location.format(absolute=secret))])
    ricciq(line, "--json").refuses(str(file), "beside")


@pytest.mark.usefixtures("nothing_opens", "secret")
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_external_data_are_found_wherever_they_are_named(
    ricciq: Callable[..., Answer], file: Path, place: Callable[[Path, TensorProto], object]
) -> None:
    place(file, outside("../secret"))
    ricciq(EVERY["inspect"]).refuses(str(file), "'../secret'", "beside")


@pytest.mark.usefixtures("nothing_opens", "secret")
def test_two_locations_are_refused(ricciq: Callable[..., Answer], file: Path) -> None:
    (file.parent / "fine").write_bytes(weights().raw_data)
    save(file, constants=[outside("fine", "../secret")])
    ricciq(EVERY["inspect"]).refuses(str(file), "beside")
    save(file, constants=[outside()])
    ricciq(EVERY["inspect"]).refuses(str(file), "beside")


@pytest.mark.usefixtures("nothing_opens")
def test_an_address_in_memory_is_refused(ricciq: Callable[..., Answer], file: Path) -> None:
    address = file.parent / "*" / "_ORT_MEM_ADDR_" / "*"
    address.parent.mkdir(parents=True)
    address.write_bytes(bytes(4096))
    save(file, constants=[outside("*/_ORT_MEM_ADDR_/*", offset=1024)])
    ricciq(EVERY["inspect"]).refuses(str(file), "beside")


SHORT: dict[str, tuple[TensorProto, str]] = {
    "missing": (outside("none.data"), "none.data"),
    "a folder": (outside("sub"), "sub"),
    "too short": (outside("short.data"), "short.data"),
    "too short, length unsaid": (outside("short.data", length=0), "[64, 10]"),
    "offset": (outside("whole.data", offset=8), "whole.data"),
    "negative offset": (outside("whole.data", offset=-8), "whole.data"),
    "negative length": (outside("whole.data", length=-8), "whole.data"),
    "no number": (outside("whole.data", offset="all"), "whole.data"),
    "long name": (outside("a" * 5000), "aaa"),
}


@each
@pytest.mark.parametrize(("data", "word"), SHORT.values(), ids=SHORT)
def test_truncated_external_data(
    ricciq: Callable[..., Answer], file: Path, data: TensorProto, word: str, line: str
) -> None:
    (file.parent / "sub").mkdir()
    (file.parent / "short.data").write_bytes(bytes(100))
    (file.parent / "whole.data").write_bytes(weights().raw_data)
    save(file, constants=[data])
    ricciq(line, "--json").refuses(str(file), word)


@each
@pytest.mark.parametrize("folder", ["", "sub/"])
def test_external_data_beside_the_file_are_used(
    ricciq: Callable[..., Answer], file: Path, folder: str, line: str, monkeypatch: Any
) -> None:
    data = file.parent / folder / "weights.data"
    data.parent.mkdir(exist_ok=True)
    data.write_bytes(weights().raw_data)
    save(file, constants=[outside(f"{folder}weights.data")])
    monkeypatch.chdir("/")  # it lies beside the file, wherever the command is run
    answer = ricciq(line, "--json")
    assert answer.code == 0, answer.err
    if line == EVERY["inspect"]:
        totals = json.loads(answer.out)["totals"]
        assert totals["layer bytes"] == 2560
        assert totals["file bytes"] == file.stat().st_size + 2560


# Models that are no image classifiers


NOT_IMAGES: dict[str, tuple[Make, str]] = {
    "no input": (
        lambda path: save(
            path, [node("RandomNormal", "", "logits", shape=[1, 10])], [], inputs=[]
        ),
        "takes nothing",
    ),
    "two inputs": (
        lambda path: save(
            path,
            [node("Add", "input other", "both"), node("Flatten", "both", "logits")],
            [],
            inputs=[tensor("input"), tensor("other")],
        ),
        "takes tensor(float) ['batch', 1, 8, 8], tensor(float)",
    ),
    "whole numbers": (
        lambda path: save(
            path,
            [node("Cast", "input", "real", to=1), node("Flatten", "real", "logits")],
            [],
            inputs=[tensor("input", TensorProto.INT64)],
        ),
        "takes tensor(int64)",
    ),
    "half precision": (
        lambda path: save(
            path,
            [node("Cast", "input", "real", to=1), node("Flatten", "real", "logits")],
            [],
            inputs=[tensor("input", TensorProto.FLOAT16)],
        ),
        "takes tensor(float16)",
    ),
    "a sequence": (
        lambda path: save(
            path,
            [node("ConcatFromSequence", "input", "logits", axis=0)],
            [],
            inputs=[helper.make_tensor_sequence_value_info("input", TensorProto.FLOAT, None)],
        ),
        "takes seq(tensor(float))",
    ),
    "rows": (
        lambda path: save(path, inputs=[tensor("input", shape=("batch", 64))]),
        "takes tensor(float) ['batch', 64]",
    ),
    "open size": (
        lambda path: save(path, inputs=[tensor("input", shape=("batch", 1, "height", "width"))]),
        "'height'",
    ),
    "no pixels": (
        lambda path: save(path, CLASSIFIER[:1], inputs=[tensor("input", shape=("batch", 1, 0, 8))],
                          outputs=[tensor("flat", shape=None)]),
        "0, 8]",
    ),
    "terapixels": (
        lambda path: save(
            path,
            [node("GlobalAveragePool", "input", "logits")],
            inputs=[tensor("input", shape=("batch", 1, 10**6, 10**6))],
        ),
        "1000000, 1000000]",
    ),
    "a batch of gigabytes": (
        lambda path: save(path, inputs=[tensor("input", shape=(10**8, 1, 8, 8))]),
        "[100000000, 1, 8, 8]",
    ),
    "pixels with channels first": (
        lambda path: save(path, PIXELS, inputs=[tensor("input", TensorProto.UINT8)]),
        "takes tensor(uint8) ['batch', 1, 8, 8]",
    ),
    "pixels of two channels": (
        lambda path: save(path, PIXELS, [weights((128, 10))],
                          inputs=[tensor("input", TensorProto.UINT8, ("batch", 8, 8, 2))]),
        "takes tensor(uint8) ['batch', 8, 8, 2]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "line", [*EVALUATIONS.values(), *BENCHES.values()], ids=[*EVALUATIONS, *BENCHES]
)
@pytest.mark.parametrize(("make", "word"), NOT_IMAGES.values(), ids=NOT_IMAGES)
def test_models_that_take_no_images(
    ricciq: Callable[..., Answer], file: Path, make: Make, word: str, line: str
) -> None:
    make(file)
    ricciq(line, "--json").refuses(str(file), word)


NOT_LOGITS: dict[str, tuple[Make, str]] = {
    "two outputs": (
        lambda path: save(path, outputs=[tensor("logits", shape=None), tensor("flat", shape=None)]),
        "tensor(float), tensor(float)",
    ),
    "a sequence": (
        lambda path: save(
            path,
            [node("SequenceConstruct", "input", "logits")],
            [],
            outputs=[helper.make_tensor_sequence_value_info("logits", TensorProto.FLOAT, None)],
        ),
        "seq(tensor(float))",
    ),
    "whole numbers": (
        lambda path: save(
            path,
            [*CLASSIFIER[:1], node("ArgMax", "flat", "logits", axis=1)],
            [],
            outputs=[tensor("logits", TensorProto.INT64, None)],
        ),
        "tensor(int64)",
    ),
    "a map": (lambda path: save(path, [node("Relu", "input", "logits")], []), "(1, 1, 8, 8)"),
    "one row for all": (
        lambda path: save(
            path, [*CLASSIFIER[:1], node("Reshape", "flat wide", "logits")],
            [numpy_helper.from_array(np.array([32, -1]), "wide")],
        ),
        "(32, 2)",
    ),
    "nine classes": (lambda path: save(path, constants=[weights((64, 9))]), "10 classes"),
}  # fmt: skip


@each_evaluation
@pytest.mark.parametrize(("make", "word"), NOT_LOGITS.values(), ids=NOT_LOGITS)
def test_models_with_other_outputs(
    ricciq: Callable[..., Answer], file: Path, make: Make, word: str, line: str
) -> None:
    make(file)
    ricciq(line, "--json").refuses(str(file), word)


@each_other
@pytest.mark.parametrize("make", [make for make, _ in NOT_LOGITS.values()], ids=NOT_LOGITS)
def test_timing_and_inspection_ignore_outputs(
    ricciq: Callable[..., Answer], file: Path, make: Make, line: str
) -> None:
    make(file)
    assert ricciq(line, "--json").code == 0


@pytest.mark.parametrize("make", [make for make, _ in NOT_IMAGES.values()], ids=NOT_IMAGES)
def test_inspection_ignores_inputs(ricciq: Callable[..., Answer], file: Path, make: Make) -> None:
    make(file)
    assert ricciq(EVERY["inspect"], "--json").code == 0


@pytest.mark.parametrize("line", BENCHES.values(), ids=BENCHES)
def test_a_batch_the_file_does_not_take(
    ricciq: Callable[..., Answer], file: Path, line: str
) -> None:
    save(file, inputs=[tensor("input", shape=(2, 1, 8, 8))])
    answer = ricciq(line, "--json")
    assert answer.code == 2
    assert answer.err == (
        f"ricciq: {file} takes 2 images in a call, not --batch 1; give --batch 2\n"
    )
    assert ricciq(line, "--batch", "2").code == 0
    save(file, [node("Reshape", "input shape", "flat"), CLASSIFIER[1]],
         [weights(), numpy_helper.from_array(np.array([2, 64]), "shape")])  # fmt: skip
    ricciq(line, "--json").refuses(str(file), "(1, 1, 8, 8)")


# Metadata


def with_preprocessing(**changes: object) -> dict[str, object]:
    return {**METADATA, "preprocessing": {**PREPROCESSING, **changes}}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


METADATAS: dict[str, tuple[object, str]] = {
    "none": (None, "no ricciq metadata"),
    "empty": ("", "no ricciq metadata"),
    "no JSON": ("{'preprocessing'", "no ricciq metadata"),
    "a list": ([1, 2], "no ricciq metadata"),
    "a number": ("3", "no ricciq metadata"),
    "deep": (nested(100_000), "no ricciq metadata"),
    "no preprocessing": ({"class_names": CLASSES}, "no ricciq metadata"),
    "NaN": (with_preprocessing(mean=[float("nan")]), "no ricciq metadata"),
    "infinite": (json.dumps(with_preprocessing(mean=[5])).replace("5", "1e999"), "no ricciq"),
    "no classes": ({"preprocessing": PREPROCESSING}, "class_names"),
    "classes in one word": ({**METADATA, "class_names": "0123456789"}, "class_names"),
    "numbered classes": ({**METADATA, "class_names": list(range(10))}, "class_names"),
    "nine names": ({**METADATA, "class_names": CLASSES[:9]}, "9 classes"),
    "a list for preprocessing": ({**METADATA, "preprocessing": [1, 8, 8]}, "preprocessing"),
    "null for preprocessing": ({**METADATA, "preprocessing": None}, "preprocessing"),
    "no size": ({**METADATA, "preprocessing": {"mean": [0], "std": [1]}}, "input_size"),
    "a word for the size": (with_preprocessing(input_size="large"), "preprocessing"),
    "two for the size": (with_preprocessing(input_size=[8, 8]), "preprocessing"),
    "a huge size": (with_preprocessing(input_size=[1, 10**9, 10**9]), "input_size"),
    "a size of another model": (with_preprocessing(input_size=[1, 16, 16]), "(1, 16, 16)"),
    "no channels": (with_preprocessing(input_size=[0, 8, 8]), "input_size"),
    "three means": (with_preprocessing(mean=[0, 0, 0]), "mean"),
    "a mean beyond floats": (with_preprocessing(mean=[10**400]), "preprocessing"),
    "a word for the mean": (with_preprocessing(mean=["half"]), "preprocessing"),
    "no deviation": (with_preprocessing(std=[0]), "std"),
    "unknown interpolation": (with_preprocessing(interpolation="magic"), "interpolation"),
    "unknown crop": (with_preprocessing(crop_mode="magic"), "crop_mode"),
    "a crop of nothing": (with_preprocessing(crop_pct=1e-9), "crop_pct"),
    "an unknown input": ({**METADATA, "input": "uint4"}, "input is 'uint4'"),
    "another input": ({**METADATA, "input": "uint8"}, "uint8 images of (1, 8, 8)"),
}


@each_evaluation
@pytest.mark.parametrize(("stored", "word"), METADATAS.values(), ids=METADATAS)
def test_invalid_metadata(
    ricciq: Callable[..., Answer], file: Path, stored: object, word: str, line: str
) -> None:
    save(file, metadata=stored)
    ricciq(line, "--json").refuses(str(file), word, "`ricciq export`")


@each_other
@pytest.mark.parametrize("stored", [stored for stored, _ in METADATAS.values()], ids=METADATAS)
def test_timing_and_inspection_need_no_metadata(
    ricciq: Callable[..., Answer], file: Path, stored: object, line: str
) -> None:
    save(file, metadata=stored)
    answer = ricciq(line, "--json")
    assert answer.code == 0, answer.err
    json.loads(answer.out, parse_constant=pytest.fail)
    shown = ricciq(line)
    assert shown.code == 0, shown.err


OTHER_CLASSES: dict[str, tuple[list[str], str]] = {
    "as many": ([*CLASSES[:4], "four", *CLASSES[5:]], "'4'"),
    "fewer": (CLASSES[:9], "9"),
}


@each_evaluation
@pytest.mark.parametrize(("names", "word"), OTHER_CLASSES.values(), ids=OTHER_CLASSES)
def test_data_of_other_classes(
    ricciq: Callable[..., Answer], file: Path, names: list[str], word: str, line: str
) -> None:
    save(file, constants=[weights((64, len(names)))], metadata={**METADATA, "class_names": names})
    ricciq(line, "--json").refuses(str(file), "digits", word)


@pytest.mark.parametrize("names", [CLASSES[::-1], [*CLASSES, "ten"]], ids=["order", "more"])
def test_classes_are_found_by_name_but_those_of_a_reference_must_be_the_same(
    ricciq: Callable[..., Answer], file: Path, names: list[str]
) -> None:
    save(file, constants=[weights((64, len(names)))], metadata={**METADATA, "class_names": names})
    answer = ricciq(EVALUATIONS["eval"], "--json")
    assert answer.code == 0, answer.err
    assert "found by their names" in answer.err
    ricciq(EVALUATIONS["reference"], "--json").refuses(str(file), "digits", "but")


def test_a_reference_with_other_preprocessing(ricciq: Callable[..., Answer], file: Path) -> None:
    save(file, metadata=with_preprocessing(mean=[0.25]))
    ricciq(EVALUATIONS["reference"], "--json").refuses(str(file), "prepares its images unlike")


# Names and graphs that could do harm


def test_names_cannot_steer_the_terminal(ricciq: Callable[..., Answer], file: Path) -> None:
    name = "\x1b]0;owned\x07[bold]x[/no such tag]\x1b[2J"
    nodes = [CLASSIFIER[0], node("MatMul", "flat w", "logits", name=name)]
    save(file, nodes, metadata={**METADATA, "ricciq": f"{name} 1.0"})
    answer = ricciq(EVERY["inspect"])
    assert answer.code == 0, answer.err
    assert "\x1b]0" not in answer.out + answer.err
    assert "\x1b[2J" not in answer.out
    broken = [CLASSIFIER[0], node("Magic", "flat w", "logits", name=name)]
    save(file, broken)
    refused = ricciq(EVERY["inspect"])
    refused.refuses(str(file))
    assert "\x1b" not in refused.err


def test_a_constant_that_doubles_in_every_node_is_inspected_at_once(
    ricciq: Callable[..., Answer], file: Path
) -> None:
    doublings = [node("Add", f"w{i} w{i}", f"w{i + 1}") for i in range(60)]
    nodes = [*doublings, CLASSIFIER[0], node("MatMul", "flat w60", "logits")]
    save(file, nodes, [weights(name="w0")])
    answer = ricciq(EVERY["inspect"], "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["totals"]["layer bytes"] == 2560


@pytest.mark.parametrize("count", [1, 3000])
def test_a_long_chain_of_constants_is_inspected(
    ricciq: Callable[..., Answer], file: Path, count: int
) -> None:
    chain = [node("Neg", f"w{i}", f"w{i + 1}") for i in range(count)]
    nodes = [*chain, CLASSIFIER[0], node("MatMul", f"flat w{count}", "logits")]
    save(file, nodes, [weights(name="w0")])
    assert ricciq(EVERY["inspect"], "--json").code == 0


# Quantizing


class Bare(nn.Module):
    """A classifier without a convolution or a linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2)) @ self.weight


def test_a_model_with_nothing_to_quantize(
    ricciq: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bare_of_hostile_test(num_classes: int = 10, **_: object) -> nn.Module:
        return Bare(num_classes)

    register_model(bare_of_hostile_test)
    assert timm.is_model("bare_of_hostile_test")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    recipe = tmp_path / "folder" / "r.yaml"
    recipe.write_text("model: {pretrained: false}\ndata: {input_size: 8}\n")
    line = f"quantize bare_of_hostile_test --data digits --recipe {recipe}"
    ricciq(line, "--bits", "2").refuses("Bare", "no convolution or linear layer")
    assert sorted(os.listdir(tmp_path)) == before
