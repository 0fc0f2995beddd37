"""A parser of ricciq reads any input, or refuses it with a RicciqError of one sentence."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mutations_of_data import image, tar_of
from safetensors.torch import save

from ricciq.cli import options
from ricciq.data.preprocessing import Preprocessing
from ricciq.data.sources import folder, webdataset
from ricciq.data.sources.tar import files_in_tar
from ricciq.errors import RicciqError
from ricciq.models.factory import load_model
from ricciq.recipe import Recipe
from ricciq.report.schema import load_report
from ricciq.system.tables import read_csv
from ricciq.system.tensor_files import METADATA_KEY, State, load_tensors
from ricciq.training.state import TrainingState
from ricciq.workflows.saved import rebuild

pytestmark = [pytest.mark.hostile, pytest.mark.slow]

quickly = settings(
    max_examples=150,
    deadline=10_000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
few = settings(quickly, max_examples=40)

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, -(2**63), "1e999", "..", "\0", "\ud800", "ternary", "auto"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
"""What JSON and YAML can hold."""
YAML = st.text("{}[]&*!|>%@`'\"#:,-?<= \n\tabcde0123456789._~", max_size=200)


@contextmanager
def only_our_errors() -> Iterator[None]:
    with suppress(RicciqError):
        yield


def leaves(whole: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in plain nested values."""
    yield path
    parts: Any = ()
    if isinstance(whole, dict):
        parts = whole.items()
    elif isinstance(whole, list):
        parts = enumerate(whole)
    for key, part in parts:
        yield from leaves(part, (*path, key))


def replaced(whole: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    key, *rest = path
    parts = dict(whole) if isinstance(whole, dict) else list(whole)
    parts[key] = replaced(parts[key], tuple(rest), value)
    return parts


# Recipes


@quickly
@given(st.binary(max_size=300) | YAML.map(str.encode))
@example(b"a: " + b"1:" * 900 + b"1")
@example(b"? ? ? a")
@example(b"!!float x: !!int y")
@example(b"!!bool maybe")
@example(b"<<: [1]")
def test_recipes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with only_our_errors():
        Recipe.load(path)


KEYS = [
    f"{section}.{key}"
    for section, values in Recipe().model_dump().items()
    for key in (values if isinstance(values, dict) else [""])
]


@quickly
@given(st.sampled_from(KEYS) | st.text(max_size=12), PLAIN)
def test_values_of_recipes(key: str, value: Any) -> None:
    with only_our_errors():
        recipe = Recipe().override({key.strip("."): value})
        assert Recipe.from_values(recipe.model_dump()) == recipe


# Tars and shards


TAR = tar_of({"0/a.png": image("PNG"), "1/b.png": image("PNG"), "x.cls": b"1"})


@st.composite
def patched(draw: st.DrawFn) -> bytes:
    """A tar with a few bytes of its headers replaced."""
    content = bytearray(TAR)
    for _ in range(draw(st.integers(1, 3))):
        block = draw(st.sampled_from([0, 1024, 2048]))
        # Fields of a header: the name, the size, the kind, and whatever else there is.
        at = block + draw(st.sampled_from([0, 124, 148, 156, 157, 257, 345]) | st.integers(0, 511))
        new = draw(st.binary(min_size=1, max_size=12))
        content[at : at + len(new)] = new
    if draw(st.booleans()):  # with a sum that is right, or it is soon refused
        for block in (0, 1024, 2048):
            content[block + 148 : block + 156] = b" " * 8
            total = sum(content[block : block + 512])
            content[block + 148 : block + 156] = b"%06o\0 " % total
    return bytes(content)


@quickly
@given(st.binary(max_size=2000) | patched())
def test_tars(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with only_our_errors():
        for member in files_in_tar(path):
            assert ".." not in member.name.split("/")
            assert not member.name.startswith("/")
            assert len(member.read()) == member.size


@quickly
@given(patched(), st.none() | PLAIN)
def test_data_sets(tmp_path: Path, content: bytes, info: Any) -> None:
    (tmp_path / "train.tar").write_bytes(content)
    (tmp_path / "val.tar").write_bytes(TAR)
    with only_our_errors():
        folder.open_source(str(tmp_path), None)
    (tmp_path / "_info.json").write_text(json.dumps(info))
    with only_our_errors():
        webdataset.open_source("wds/fuzz", tmp_path)
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": info}}))
    with only_our_errors():
        webdataset.open_source("wds/fuzz", tmp_path)


# Weights and what is said in them


def stored(metadata: str) -> bytes:
    return save({"w": torch.zeros(2)}, {METADATA_KEY: metadata})


@quickly
@given(st.binary(max_size=200) | PLAIN.map(lambda v: stored(json.dumps(v))))
def test_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with only_our_errors():
        assert isinstance(load_tensors(path)[1], dict)
    with only_our_errors():
        load_model("digits_resnet8", num_classes=10, channels=1, checkpoint=path, pretrained=False)


ABOUT: dict[str, Any] = {
    "recipe": Recipe().override({"model.name": "digits_resnet8"}).model_dump(mode="json"),
    "preprocessing": Preprocessing((1, 8, 8), (0.5,), (0.5,)).to_dict(),
    "class_names": ["a", "b"],
    "plan": {
        "layers": [
            {"name": "fc", "weight_bits": 4, "act_bits": 4, "norm": None, "parent": None}
        ],
        "points": {"layer1.0": "layer1.0"},
        "kept": [{"name": "x", "kind": "x", "why": "x"}],
    },
}  # fmt: skip


@few
@given(st.sampled_from(list(leaves(ABOUT))), PLAIN)
def test_what_a_run_says_of_its_model(tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    file = tmp_path / "best.safetensors"
    file.write_bytes(stored(json.dumps(replaced(ABOUT, path, value))))
    with only_our_errors():
        rebuild(file)


PROGRESS = vars(TrainingState(tally={"loss": 1.0, "images": 5}, geometry={"a": {"b": 1.0}}))


@quickly
@given(st.sampled_from(list(leaves(PROGRESS))), PLAIN)
def test_progress(path: tuple[Any, ...], value: Any) -> None:
    with only_our_errors():
        done = TrainingState.of(State({}, {"progress": replaced(PROGRESS, path, value)}, Path("x")))
        assert done.epoch >= 0


@quickly
@given(PLAIN)
def test_preprocessing(value: Any) -> None:
    for path in leaves(ABOUT["preprocessing"]):
        try:
            made = Preprocessing.from_dict(replaced(ABOUT["preprocessing"], path, value))
        except ValueError:
            continue
        assert max(made.input_size) < 8192


@quickly
@given(st.binary(max_size=200) | PLAIN.map(lambda v: json.dumps(v).encode()))
def test_reports_and_tables(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with only_our_errors():
        load_report(path)
    with only_our_errors():
        read_csv(path, {"epoch": int})


# Options


WORDS = st.text(string.printable, max_size=12) | st.sampled_from(
    ["auto:", "auto:nan", "auto:inf", "auto:1e999", "9" * 5000, "²", "٣", "1_0", " 4", "0x4", "4MB"]
)


@quickly
@given(*[st.none() | WORDS] * 4)
def test_widths(
    bits: str | None, weights: str | None, activations: str | None, most: str | None
) -> None:
    with only_our_errors():
        asked = options.widths(bits, weights, activations, most, [])
        Recipe().override({f"quantization.{key}": value for key, value in asked.items()})


@quickly
@given(WORDS)
def test_batch_sizes(text: str) -> None:
    with only_our_errors():
        options.training_batch_size(text)


@pytest.mark.parametrize("base", [Recipe().override({"data.name": "digits"})])
@quickly
@given(st.from_regex(r"(ricci|ste|ewgs|x)(:[a-z_.]{1,9}=?.{0,9}){0,3}", fullmatch=True) | WORDS)
@example("ricci:block=" + "9" * 5000)
@example("ricci:block=" + "[" * 5000)
@example("ricci:time=1:59:59")
@example("ste:training.lr=.nan")
def test_methods(base: Recipe, method: str) -> None:
    from ricciq.workflows.compare import Trial

    with only_our_errors():
        Trial(method, 1.0, 0).recipe(base)
