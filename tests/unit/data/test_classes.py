"""Class maps in every form, and data whose classes are some of a network's outputs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from timm.data.readers.class_map import load_class_map

from ricciq.data.classes import imagenet_synsets, read_class_map
from ricciq.data.dataset import ImageData
from ricciq.data.sources.base import ImageArrays
from ricciq.errors import DataError

NAMES = ["cat", "dog", "emu"]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


FORMS = {
    "lines": ("map.txt", "cat\ndog\nemu\n"),
    "lines of Windows": ("map.txt", "\ufeffcat\r\ndog\r\nemu\r\n\r\n"),
    "another suffix": ("classes.names", "cat\ndog\nemu"),
    "a list": ("map.json", '["cat", "dog", "emu"]'),
    "names and numbers": ("map.json", '{"emu": 2, "cat": 0, "dog": 1}'),
    "numbers and names": ("map.JSON", '{"2": "emu", "0": "cat", "1": "dog"}'),
}


@pytest.mark.parametrize(("name", "content"), FORMS.values(), ids=FORMS)
def test_the_forms_of_a_class_map(name: str, content: str, tmp_path: Path) -> None:
    found = read_class_map(written(tmp_path, name, content))
    assert found.is_complete
    assert found.outputs(3) == NAMES


def test_lines_are_read_as_timm_reads_them(tmp_path: Path) -> None:
    path = written(tmp_path, "map.txt", "10\n1\nn 2 \n")
    theirs = load_class_map(str(path))
    assert {name: number for number, name in read_class_map(path).names.items()} == theirs


def test_outputs_without_a_name_have_their_number(tmp_path: Path) -> None:
    found = read_class_map(written(tmp_path, "map.json", '{"dog": 3, "cat": 1}'))
    assert not found.is_complete
    assert found.outputs(5) == ["#0", "cat", "#2", "dog", "#4"]  # "2" may be a folder
    with pytest.raises(DataError, match=r"'dog' as class 3, but the model has 3 classes"):
        found.outputs(3)


def test_a_name_that_is_no_utf_8_is_that_of_its_folder(tmp_path: Path) -> None:
    path = written(tmp_path, "map.txt", b"stra\xdfe\ncat\n")
    (folder := tmp_path / "stra\udcdfe").mkdir()
    part = ImageArrays(np.zeros((4, 8, 8, 1), np.uint8), [0, 0, 1, 1])
    data = ImageData("x", [folder.name, "cat"], True, part, part)
    assert read_class_map(path).outputs(2) == data.class_names


class Evil:
    def __reduce__(self) -> object:
        return (Path("owned").touch, ())


INVALID: dict[str, tuple[str, str | bytes, str]] = {
    "a pickle": ("map.pkl", pickle.dumps({"cat": 0}), "pickle"),
    "a hostile pickle": ("map.pickle", pickle.dumps(Evil()), "pickle"),
    "nothing": ("map.txt", "", "line 1 is empty"),
    "an empty line": ("map.txt", "cat\n\ndog\n", "line 2 is empty"),
    "a name twice": ("map.txt", "cat\ndog\ncat\n", "'cat'"),
    "a number twice": ("map.json", '{"cat": 0, "dog": 0}', "'dog'"),
    "a key twice": ("map.json", '{"cat": 0, "cat": 1}', "'cat'"),
    "a negative number": ("map.json", '{"cat": -1}', "-1"),
    "a truth": ("map.json", '{"cat": true}', "True"),
    "a fraction": ("map.json", '{"cat": 0.5}', "0.5"),
    "no JSON": ("map.json", "cat", "cannot be read"),
    "a number": ("map.json", "3", "no list or object"),
    "an empty object": ("map.json", "{}", "empty"),
    "lists in a list": ("map.json", '[["cat"], ["dog"]]', "other things"),
    "deep": ("map.json", "[" * 100_000, "cannot be read"),
}


@pytest.mark.parametrize(("name", "content", "word"), INVALID.values(), ids=INVALID)
def test_invalid_class_maps(name: str, content: str | bytes, word: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError, match="; ") as error:
        read_class_map(path)
    assert str(path) in str(error.value)
    assert word in str(error.value)
    assert not Path("owned").exists()


def test_a_class_map_that_is_missing_or_a_folder_or_huge(tmp_path: Path) -> None:
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(20_000_000)
    for path in (tmp_path / "none.txt", tmp_path, tmp_path / "huge.txt"):
        with pytest.raises(DataError, match="cannot be read"):
            read_class_map(path)


def test_classes_become_outputs_of_the_same_name() -> None:
    train = ImageArrays(np.zeros((6, 8, 8, 1), np.uint8), [0, 0, 1, 1, 2, 2])
    val = ImageArrays(np.zeros((3, 8, 8, 1), np.uint8), [0, 1, 2])
    data = ImageData("pets", NAMES, True, train, val)
    held_out = data.targets("holdout").tolist()
    data.use_outputs(["yak", "emu", "ape", "cat", "dog"], "weights")
    assert data.num_classes == 5
    assert data.targets("val").tolist() == [3, 4, 1]
    assert data.labels("val") == NAMES
    assert data.targets("holdout").tolist() == [[3, 4, 1][target] for target in held_out]
    data.use_outputs(data.class_names, "weights")  # again changes nothing
    assert data.labels("val") == NAMES


def test_a_class_that_the_outputs_lack_is_named() -> None:
    part = ImageArrays(np.zeros((4, 8, 8, 1), np.uint8), [0, 0, 1, 1])
    data = ImageData("pets", ["cat", "dog"], True, part, part)
    with pytest.raises(DataError, match=r"'pets' has the class 'dog', which map.txt does not have"):
        data.use_outputs(["cat", "emu"], "map.txt")


def test_a_name_that_two_outputs_have_is_refused_unless_all_are_the_same() -> None:
    """As crane and maillot, which are two classes of ImageNet each."""
    part = ImageArrays(np.zeros((6, 8, 8, 1), np.uint8), [0, 0, 1, 1, 2, 2])
    data = ImageData("birds", ["crane", "cat", "crane"], True, part, part)
    data.use_outputs(["crane", "cat", "crane"], "weights")
    assert data.targets("val").tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(DataError, match=r"map.txt has the class 'crane' of data 'birds' twice"):
        data.use_outputs(["cat", "crane", "crane"], "map.txt")


def test_imagenets_synsets_are_timms() -> None:
    synsets = imagenet_synsets(1000)
    assert synsets is not None
    assert (len(synsets), synsets[0], synsets[217]) == (1000, "n01440764", "n02102040")
    assert len(imagenet_synsets(21843) or ()) == 21843
    assert imagenet_synsets(10) is None
    assert json.loads(json.dumps(synsets)) == synsets
