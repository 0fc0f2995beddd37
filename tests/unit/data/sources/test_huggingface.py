"""Hugging Face data sets in folders: columns, splits and labels, and what is refused."""

import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from datasets import ClassLabel, Features, Image, Value
from forms import CLASSES, as_image_folder, as_parquet, everything, png, refusal

from ricciq.data.open import open_data


def write(root: Path, split="train", labels=(0, 1, 0, 1), names=CLASSES, **more) -> str:
    """A split with these labels, and more columns given as (feature, values)."""
    columns = {
        "image": (Image(), [{"bytes": png(i), "path": None} for i in range(len(labels))]),
        "kind": (ClassLabel(names=list(names)), list(labels)),
    } | more
    columns = {name: column for name, column in columns.items() if column}
    data = datasets.Dataset.from_dict(
        {name: values for name, (_, values) in columns.items()},
        Features({name: feature for name, (feature, _) in columns.items()}),
    )
    (root / "pets").mkdir(exist_ok=True)
    data.to_parquet(root / "pets" / f"{split}.parquet")
    return f"hfds/{root / 'pets'}"


def opened(name: str, tmp_path: Path):
    return open_data(name, tmp_path / "cache")


def test_columns_are_found_by_their_kind(tmp_path):
    more = {"id": (Value("int64"), [1, 2, 3, 4]), "text": (Value("string"), list("abcd"))}
    write(tmp_path, **more)
    data = opened(write(tmp_path, "validation", **more), tmp_path)
    assert data.class_names == ["cat", "dog"]
    assert data._splits["val"][0].targets.tolist() == [0, 1, 0, 1]


def test_a_relative_folder_is_read_with_nothing_from_the_network(tmp_path, monkeypatch):
    import socket

    as_parquet(tmp_path)
    monkeypatch.chdir(tmp_path)

    def connect(*_):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert len(everything("hfds/./pets", tmp_path / "cache")["val"][0]) == 4


@pytest.mark.parametrize("split", ["validation", "val", "valid", "test"])
def test_validation_has_several_names(tmp_path, split):
    write(tmp_path)
    assert len(opened(write(tmp_path, split), tmp_path)._splits["val"][1]) == 4


def test_validation_goes_before_test(tmp_path):
    write(tmp_path)
    write(tmp_path, "test", labels=(0,))
    assert len(opened(write(tmp_path, "validation"), tmp_path)._splits["val"][1]) == 4


def test_labels_are_read_without_decoding(tmp_path, monkeypatch):
    name, cache = as_parquet(tmp_path)
    monkeypatch.setattr(Image, "decode_example", lambda *_, **__: pytest.fail("decoded"))
    open_data(name, cache)


def test_a_damaged_file_of_an_image_folder_is_named(tmp_path):
    name, cache = as_image_folder(tmp_path)
    bad = tmp_path / "pets" / "val" / "dog" / "1.png"
    bad.write_bytes(b"no image")
    refusal(name, cache, str(bad), "repair or remove it")


# What is refused


def test_without_the_library_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refusal("hfds/pets", tmp_path, "pip install 'ricciq[hf]'")


@pytest.mark.parametrize("name", ["hfds/./nowhere", "hfds//no/where"])
def test_a_folder_that_is_not_there_is_named(tmp_path, name):
    refusal(name, tmp_path, name, "no folder")


def test_a_name_out_of_reach_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refusal("hfds/ricciq/no-such-set", tmp_path, "hfds/ricciq/no-such-set", "network")


def test_a_damaged_parquet_file_is_refused(tmp_path):
    write(tmp_path)
    name = write(tmp_path, "validation")
    (tmp_path / "pets" / "validation.parquet").write_bytes(b"PAR1 no")
    refusal(name, tmp_path / "cache", name, "cannot be loaded")


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "pets").mkdir()
    refusal(f"hfds/{tmp_path / 'pets'}", tmp_path / "cache", "cannot be loaded")


@pytest.mark.parametrize("splits", [["train"], ["validation", "test"]])
def test_both_splits_are_needed(tmp_path, splits):
    for split in splits:
        name = write(tmp_path, split)
    refusal(name, tmp_path / "cache", ", ".join(splits), "it needs train, and one of validation")


@pytest.mark.parametrize(
    "columns",
    [
        {"image": None, "text": (Value("string"), list("abcd"))},
        {"kind": None, "label": (Value("int64"), [0, 1, 0, 1])},
        {"other": (Image(), [{"bytes": png(i), "path": None} for i in range(4)])},
        {"other": (ClassLabel(names=["a"]), [0] * 4)},
    ],
)
def test_columns_in_doubt_are_listed(tmp_path, columns):
    write(tmp_path, **columns)
    name = write(tmp_path, "validation", **columns)
    added = [column for column, content in columns.items() if content]
    refusal(name, tmp_path / "cache", "split train", *added, "one Image and one ClassLabel")


@pytest.mark.parametrize("label", [-1, None])
def test_images_without_labels_are_refused(tmp_path, label):
    write(tmp_path)
    name = write(tmp_path, "test", labels=(0, 1, label, 1))
    refusal(name, tmp_path / "cache", "row 2 of split test", "-1", "0 to 1")


def test_an_empty_row_is_named(tmp_path):
    images = [{"bytes": png(i), "path": None} for i in range(4)]
    images[1] = None
    write(tmp_path)
    name = write(tmp_path, "validation", image=(Image(), images))
    refusal(name, tmp_path / "cache", "image 1 of split validation", "the row is empty")
