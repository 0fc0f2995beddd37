"""Reports: plain values in, JSON and Markdown out, and back; the schema says what is in them."""

import json
from importlib import resources

import jsonschema
import pytest

from ricciq.errors import InputError
from ricciq.report.page import to_markdown
from ricciq.report.schema import Report, load_report

VALUES = {
    "schema": 1,
    "ricciq": "0.1.0",
    "model": "digits_resnet8",
    "data": "digits",
    "method": "ricci",
    "weight_bits": "ternary",
    "act_bits": 2,
    "seed": 7,
    "float": {"top1": 97.21, "top5": 99.91, "loss": 0.1234, "samples": 360},
    "quantized": {"top1": 94.32, "top5": 99.82, "loss": 0.2345, "samples": 360},
    "onnx": {
        "top1": 94.33,
        "top5": 99.73,
        "loss": 0.3456,
        "samples": 360,
        "agreement": 99.44,
        "max_abs_diff": 0.125,
        "agreement_unoptimized": 98.65,
        "top1_unoptimized": 94.21,
        "path": "model.onnx",
        "float_agreement": 96.54,
        "float_from": "layer2.0.conv1",
    },
    "size": {"float_bytes": 400123, "onnx_bytes": 100456, "ratio": 0.251},
    "latency": {
        "float_ms": 2.51,
        "onnx_ms": 1.23,
        "speedup": 2.04,
        "threads": 1,
        "batch": 1,
        "integer_instructions": False,
    },
    "layers": [
        {
            "name": "layer1.0.conv1",
            "kind": "QuantConv2d",
            "weight_bits": "ternary",
            "act_bits": 2,
            "parameters": 2304,
            "bytes": 461,
            "fused": True,
            "channels": 16,
            "depthwise": False,
        }
    ],
    "float_training": {"head_epochs": 1, "epochs": 4, "holdout_top1": 95.0},
    "labelled": True,
    "kept": [
        {"name": "head.norm", "kind": "LayerNorm", "why": "LayerNorm has no discrete counterpart"},
        {"name": "attn", "kind": "matmul", "why": "products of two activations stay float"},
    ],
    "geometry": {
        "perturbation_start": 0.345,
        "perturbation_end": 0.0567,
        "decay": 0.164,
        "mismatch_cosine": 0.9876,
        "applied": False,
    },
    "training": {
        "epochs": 3,
        "steps": 63,
        "seconds": 12.0,
        "device": "cpu",
        "images_per_second": 345.0,
        "skipped_steps": 2,
        "holdout_top1": 95.83,
        "chosen_epoch": 2,
    },
    "messages": ["the head was replaced"],
    "operators": {"QLinearConv": 1, "Clip": 2},
}
# CONTRACT.md, report.json schema 1.
CONTRACT = {
    "": "schema ricciq model data method weight_bits act_bits seed float quantized onnx size "
    "latency layers kept geometry training",
    "float": "top1 top5 loss samples",
    "quantized": "top1 top5 loss",
    "onnx": "top1 top5 loss agreement max_abs_diff agreement_unoptimized path",
    "size": "float_bytes onnx_bytes ratio",
    "latency": "float_ms onnx_ms speedup threads batch",
    "geometry": "perturbation_start perturbation_end decay mismatch_cosine applied",
    "training": "epochs steps seconds device images_per_second",
}


@pytest.fixture
def report() -> Report:
    return Report.model_validate(VALUES)


def test_the_keys_are_those_of_the_contract(report):
    values = report.to_dict()
    for part, keys in CONTRACT.items():
        assert set(keys.split()) <= set(values[part] if part else values), part
    layer, kept = values["layers"][0], values["kept"][0]
    assert {"name", "kind", "weight_bits", "act_bits", "parameters", "bytes"} <= set(layer)
    assert {"name", "kind", "why"} <= set(kept)


def test_a_report_is_read_as_it_was_written(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert load_report(tmp_path / "report.json") == report
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == report.to_dict() == VALUES


def test_a_report_without_training_is_read_and_rendered(tmp_path):
    training = {**VALUES["training"], "epochs": 0, "holdout_top1": None}
    report = Report.model_validate({**VALUES, "geometry": {}, "training": training, "kept": []})
    report.save(tmp_path / "report.json")
    assert load_report(tmp_path / "report.json") == report
    assert "None" not in to_markdown(report)
    assert "Nothing." in to_markdown(report)


def test_the_page_has_the_figures_and_everything_that_was_kept(report):
    page = to_markdown(report)
    figures = "96.54 97.21 94.32 94.33 99.91 99.82 99.73 0.1234 0.2345 0.3456 99.44 98.65 0.12 360"
    figures += " 400123 100456 0.251 2.51 1.23 2.04 0.345 0.0567 0.164 0.9876 95.83 63"
    missing = [figure for figure in figures.split() if figure not in page]
    assert not missing
    for kept in report.kept:
        assert f"| {kept.name} | {kept.kind} | {kept.why} |" in page
    assert "| layer1.0.conv1 | QuantConv2d | ternary | 2 | 2304 | 461 | yes |" in page
    assert "2 steps skipped" in page
    assert "equal up to the input of layer `layer2.0.conv1`" in page
    report.onnx.float_from = None
    assert "the codes of both are equal." in to_markdown(report)
    assert "- the head was replaced" in page


@pytest.mark.parametrize(
    ("applied", "said", "unsaid"),
    [
        (False, "is a probe", "was applied"),
        (True, "was applied", "probe"),
        (None, "geometry", "applied"),  # a report of a version without the key
    ],
)
def test_a_flow_that_is_not_applied_is_called_a_probe(applied, said, unsaid):
    geometry = {key: value for key, value in VALUES["geometry"].items() if key != "applied"}
    if applied is not None:
        geometry["applied"] = applied
    page = to_markdown(Report.model_validate({**VALUES, "geometry": geometry}))
    assert said in page
    assert unsaid not in page


@pytest.mark.parametrize("text", ["", "garbage", "[]", '{"schema": 1}', "null", "\x00"])
def test_garbage_is_no_report(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"report\.json is not the report") as caught:
        load_report(path)
    assert caught.value.exit_code == 3


def test_a_missing_or_binary_file_or_a_folder_is_no_report(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "none", tmp_path / "binary"):
        with pytest.raises(InputError, match="is not the report of a run"):
            load_report(path)


@pytest.fixture
def schema() -> dict:
    return json.loads((resources.files("ricciq") / "report.schema.json").read_text())


def test_the_shipped_schema_is_that_of_the_report(schema):
    """`python -c` with these two lines makes it again after a key was added."""
    assert schema == Report.model_json_schema(mode="serialization")


def test_the_schema_takes_reports_and_nothing_else(schema, report):
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report.to_dict(), schema)
    jsonschema.validate({**report.to_dict(), "a key of a later version": 1}, schema)
    for damage in ({"layers": 3}, {"float": {}}, {"seed": "zero"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**report.to_dict(), **damage}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({}, schema)
