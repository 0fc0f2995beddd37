"""What a run keeps in its folder gone wrong, as in `mutations`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from mutations import Mutation, Mutations, float32, header, something_else

LEFT_OUT = object()


def edited(whole: Any, path: str, value: Any) -> Any:
    """Plain values with one under a dotted path replaced, or left out."""
    part = whole
    *keys, last = path.split(".")
    for key in keys:
        part = part[int(key)] if isinstance(part, list) else part[key]
    if isinstance(part, list):
        part[int(last)] = value
    elif value is LEFT_OUT:
        part.pop(last)
    else:
        part[last] = value
    return whole


def metadata(edit: Callable[[Any], Any]) -> Mutation:
    """What ricciq says in a safetensors file, replaced by what the edit gives of it."""

    def change(entries: dict[str, Any]) -> None:
        said = edit(json.loads(entries["__metadata__"]["ricciq"]))
        text = said if isinstance(said, str) else json.dumps(said)
        entries["__metadata__"]["ricciq"] = text

    return header(change)


def said(path: str, value: Any) -> Mutations:
    shown = "nothing" if value is LEFT_OUT else repr(value)[:40]
    return {f"{path} = {shown}": metadata(lambda whole: edited(whole, path, value))}


BROKEN: Mutations = {
    "metadata that are no JSON": metadata(lambda _: "{"),
    "metadata nested deeply": metadata(lambda _: "[" * 100_000),
    "metadata that are a list": metadata(lambda _: [1]),
    "metadata that are a number": metadata(lambda _: "9" * 5000),
    "metadata that are nothing": metadata(lambda _: {}),
    "metadata of another": header(lambda h: h.update({"__metadata__": {"format": "pt"}})),
    "no metadata": header(lambda h: h.pop("__metadata__") and None),
}

ABOUT: Mutations = {
    **BROKEN,
    **said("plan", LEFT_OUT),
    **said("plan", "all"),
    **said("plan.layers", LEFT_OUT),
    **said("plan.layers", 5),
    **said("plan.layers", []),
    **said("plan.layers.0", "conv1"),
    **said("plan.layers.0.name", "nowhere"),
    **said("plan.layers.0.name", ""),
    **said("plan.layers.0.name", "bn1"),
    **said("plan.layers.0.name", 7),
    **said("plan.layers.0.name", None),
    **said("plan.layers.1.name", "conv1"),
    **said("plan.layers.0.weight_bits", "most"),
    **said("plan.layers.0.weight_bits", 10**6),
    **said("plan.layers.0.weight_bits", -3),
    **said("plan.layers.0.weight_bits", 2.5),
    **said("plan.layers.0.weight_bits", None),
    **said("plan.layers.0.act_bits", "ternary"),
    **said("plan.layers.0.act_bits", 10**6),
    **said("plan.layers.0.act_bits", []),
    **said("plan.layers.0.norm", "nowhere"),
    **said("plan.layers.0.norm", "conv1"),
    **said("plan.layers.0.norm", 3),
    **said("plan.layers.0.parent", "nowhere"),
    **said("plan.layers.0.input_of", "nowhere"),
    **said("plan.layers.0.input_of", "conv1"),
    **said("plan.layers.0.input_of", 3),
    **said("plan.layers.1.input_of", "conv1"),
    **said("plan.points", []),
    **said("plan.points", {"nowhere": "nowhere"}),
    **said("plan.points", {"conv1": ["x"]}),
    **said("plan.points", {"conv1.weight": "conv1"}),
    **said("plan.kept", "nothing"),
    **said("plan.kept", [{"name": 1}]),
    **said("class_names", LEFT_OUT),
    **said("class_names", 10),
    **said("class_names", []),
    **said("class_names", ["a"] * 11),
    **said("class_names", [1] * 10),
    **said("preprocessing", LEFT_OUT),
    **said("preprocessing", [1]),
    **said("preprocessing.input_size", [1, 8]),
    **said("preprocessing.input_size", [1, 10**6, 10**6]),
    **said("preprocessing.input_size", [3, 8, 8]),
    **said("preprocessing.input_size", ["a", 8, 8]),
    **said("preprocessing.mean", [float("nan")]),
    **said("preprocessing.std", [0.0]),
    **said("preprocessing.interpolation", "magic"),
    **said("recipe", LEFT_OUT),
    **said("recipe", "digits"),
    **said("recipe.model", 7),
    **said("recipe.model.name", "no_such_model"),
    **said("recipe.model.name", "hf-hub:owned/model"),
    **said("recipe.model.name", "../../../etc"),
    **said("recipe.model.name", "x" * 100_000),
    **said("recipe.model.name", "fashion_mobilenet"),
    **said("recipe.model.name", "resnet18"),
    **said("recipe.data.input_size", 10**6),
    **said("recipe.data.input_size", "all"),
    **said("recipe.quantization.weight_quantizer", "pickle"),
    **said("recipe.owned", 1),
}

STATES: Mutations = {
    **BROKEN,
    **said("progress", LEFT_OUT),
    **said("progress", [1]),
    **said("progress.epoch", "one"),
    **said("progress.epoch", -1),
    **said("progress.epoch", None),
    **said("progress.epoch", 0.5),
    **said("progress.steps", "many"),
    **said("progress.owned", 1),
    **said("progress.batch", -5),
    **said("progress.batch_size", "auto"),
    **said("progress.processes", 0),
    **said("progress.processes", "all"),
    **said("progress.tally", [1]),
    **said("progress.tally", {"owned": 1}),
    **said("progress.tally", {"loss": "high"}),
    **said("progress.geometry", 3),
    **said("progress.scaler", [1]),
    **said("progress.stage", "last"),
    **said("progress.best_top1", "best"),
    **said("progress.seconds", "long"),
    **said("optimizer", LEFT_OUT),
    **said("optimizer", [1]),
    **said("optimizer.state", [1]),
    **said("optimizer.state", {"x": {}}),
    **said("optimizer.state", {"0": 5}),
    **said("optimizer.state.0.exp_avg", {"tensor": "nowhere"}),
    **said("optimizer.state.0.exp_avg", {"tensor": ["x"]}),
    **said("optimizer.state.0.exp_avg", {"dtype": "nn"}),
    **said("optimizer.state.0.exp_avg", {"dtype": "load"}),
    **said("optimizer.state.0.exp_avg", {"dtype": 3}),
    **said("optimizer.param_groups", 5),
    **said("optimizer.param_groups", []),
    **said("optimizer.param_groups.0.params", [0]),
    "NaN among the weights": float32(float("nan"), "model."),
    "NaN among the moments": float32(float("nan"), "exp_avg"),
    "infinity among the moments": float32(float("inf"), "exp_avg_sq"),
}

USELESS: Mutations = {
    **said("progress.stage", 99),
    **said("progress.epoch", 10**9),
    **said("progress.steps", 10**30),
    **said("progress.geometry", {"x": {"y": 1.0}}),
}


def report(path: str, value: Any) -> Mutations:
    shown = "nothing" if value is LEFT_OUT else repr(value)[:40]
    return {f"{path} = {shown}": lambda b: json.dumps(edited(json.loads(b), path, value)).encode()}


REPORTS: Mutations = {
    "a number of 5,000 digits": something_else(b'{"schema": ' + b"9" * 5000 + b"}"),
    "nested deeply": something_else(b'{"onnx": ' * 100_000),
    "no UTF-8": lambda b: b.replace(b"digits", b"\xff\xfe"),
    **report("onnx", LEFT_OUT),
    **report("onnx", [1]),
    **report("onnx.top1", "high"),
    **report("onnx.top1", float("nan")),
    **report("onnx.loss", float("inf")),
    **report("layers", "all"),
    **report("training.epochs", 1e300),
    **report("size.ratio", None),
}

RESULTS: Mutations = {
    "a list": something_else(b"[1]"),
    "nested deeply": something_else(b"[" * 100_000),
    **report("holdout_top1", LEFT_OUT),
    **report("holdout_top1", "high"),
    **report("holdout_top1", float("nan")),
    **report("top1", [1]),
    **report("seconds", "long"),
    **report("diverged", "no"),
}

TABLES: Mutations = {
    "noise": something_else(np.random.default_rng(0).bytes(3000)),
    "text": something_else(b"no table at all\n" * 10),
    "other columns": something_else(b"a,b\n1,2\n"),
    "a field of 1 MB": something_else(b'epoch,x\n1,"' + b"x" * 1_000_000 + b'"\n'),
    "an epoch that is text": lambda b: b.replace(b"\n1,", b"\none,"),
    "NULs": lambda b: b.replace(b"\n1,", b"\n\0,"),
}
