"""Metadata of a trained model: it is read as it was written, and damage is refused by name."""

import json
from pathlib import Path

import pytest

from ricciq.convert.plan import Kept, LayerPlan, Plan
from ricciq.data.preprocessing import Preprocessing
from ricciq.recipe import Recipe
from ricciq.runs.metadata import FileMetadata, ModelMetadata, RunMetadata, accuracy_for_onnx

FILE = Path("run/best.safetensors")
RUN = RunMetadata(
    preprocessing=Preprocessing((1, 8, 8), (0.5,), (0.25,)),
    class_names=["cat", "dog"],
    labelled=True,
    recipe=Recipe().override({"model.name": "digits_resnet8", "quantization.weight_bits": 2}),
    plan=Plan([LayerPlan("fc", 2, 4, None)], {"a": "a"}, [Kept("b", "LSTM", "no kernel")]),
)


def stored() -> dict:
    return json.loads(json.dumps(RUN.to_dict()))


def test_a_checkpoint_is_read_as_it_was_written():
    assert RunMetadata.from_dict(stored(), FILE) == RUN
    assert list(stored()) == [
        "ricciq",
        "recipe",
        "preprocessing",
        "class_names",
        "labelled",
        "plan",
    ]
    # An epoch is stored beside it, and older versions did not say whether there were labels.
    older = {key: value for key, value in stored().items() if key != "labelled"}
    assert RunMetadata.from_dict({**older, "epoch": 3}, FILE) == RUN


def test_an_onnx_file_has_what_evaluation_needs_and_no_plan():
    values = RUN.for_onnx()
    assert list(values) == ["ricciq", "recipe", "class_names", "labelled", "bits"]
    assert values["bits"] == {"weights": 2, "activations": 4}
    assert RUN.for_onnx(is_float=True)["bits"] == {"weights": 32, "activations": 32}
    values["preprocessing"] = RUN.preprocessing.to_dict()  # as the export adds it
    read = ModelMetadata.from_dict(values, Path("model.onnx"))
    assert read == ModelMetadata(RUN.preprocessing, RUN.class_names, RUN.labelled)


def test_an_onnx_file_says_what_it_takes():
    values = {**RUN.for_onnx(), "preprocessing": RUN.preprocessing.to_dict()}
    file = Path("model.onnx")
    assert FileMetadata.from_dict(values, file).input_type == "float"  # older files
    assert FileMetadata.from_dict({**values, "input": "uint8"}, file).input_type == "uint8"
    for given in ("uint4", None, ["uint8"]):
        with pytest.raises(ValueError, match="input is "):
            FileMetadata.from_dict({**values, "input": given}, file)


def test_the_accuracy_of_a_file_is_four_numbers():
    class Measured:
        top1, top5, loss, samples, agreement = 97.5, 100.0, 0.1, 360, 99.0

    assert accuracy_for_onnx(Measured()) == {
        "accuracy": {"top1": 97.5, "top5": 100.0, "loss": 0.1, "samples": 360}
    }


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("recipe", None, "the recipe in run/best.safetensors"),
        ("recipe", {"quantization": {"weight_bits": 9}}, "weight_bits"),
        ("preprocessing", {}, "preprocessing lacks 'input_size'"),
        ("class_names", [], "class_names is not a list of names"),
        ("class_names", [1, 2], "class_names is not a list of names"),
        ("plan", {"layers": 5, "points": {}, "kept": []}, "plan.layers"),
    ],
)
def test_damaged_metadata_is_refused_by_name(key, value, words):
    with pytest.raises(ValueError, match=words):
        RunMetadata.from_dict({**stored(), key: value}, FILE)


@pytest.mark.parametrize("key", ["recipe", "preprocessing", "plan"])
def test_missing_metadata_is_refused_by_name(key):
    values = stored()
    del values[key]
    with pytest.raises(ValueError, match=f"^'{key}'$"):
        RunMetadata.from_dict(values, FILE)
