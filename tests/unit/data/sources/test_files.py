"""Images in files: their order, and what a million of them take."""

from __future__ import annotations

import os
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from linked import make_folder
from timm.utils.misc import natural_key

from ricciq.data.open import open_data
from ricciq.data.sources.files import ImageFiles, Names, images_below
from ricciq.errors import DataError
from ricciq.system.natural_order import natural_order

CLASSES, TRAINING, VALIDATION = 1000, 19_000, 1000
STRANGE = ["", "a", "ä/\udcff.png", "\ud800", "日本", "b" * 300]

# Between letters and numbers, digits of another script, and what sorts before and after digits.
NAMES = st.lists(st.text("aBz019٣ -./_", max_size=8), max_size=8)


@given(NAMES)
def test_the_order_is_timms(names):
    assert sorted(names, key=natural_order) == sorted(names, key=lambda n: (natural_key(n), n))


def test_names_stay_as_they_are():
    names = Names(iter(STRANGE))
    assert [names[i] for i in range(len(STRANGE))] == STRANGE
    with pytest.raises(IndexError):
        names[len(STRANGE)]


def test_paths_stay_as_they_are():
    paths = ["a/b/1.png", "1.png", "/x/1.png", "a/b/2.png", "a//b/2.png"]
    files = ImageFiles((path, 10 * i) for i, path in enumerate(paths))
    assert [files.name(i) for i in range(len(paths))] == paths
    assert files.targets.tolist() == [0, 10, 20, 30, 40]


def test_what_is_found_in_a_folder(tmp_path):
    for name in ("10.png", "9.JPG", ".hidden.png", "notes.txt", "sub/1.png", ".git/2.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = [os.path.relpath(path, tmp_path) for path in images_below(str(tmp_path))]
    assert found == ["9.JPG", "10.png", "sub/1.png"]


def test_a_folder_that_cannot_be_read_is_not_skipped(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)  # permissions do not bind root
    with pytest.raises(DataError, match=r"locked cannot be read \(Permission denied\); check"):
        images_below(str(tmp_path))


def test_many_images_are_opened_with_a_look_at_each_folder_and_in_little_memory(
    tmp_path, monkeypatch
):
    make_folder(tmp_path, CLASSES, TRAINING, VALIDATION, side=8)
    open_data(str(tmp_path))  # what is imported and cached the first time does not count
    scanned, looked_at, scan, stat = [], [], os.scandir, os.stat
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", lambda path: scanned.append(str(path)) or scan(path))
        patched.setattr(os, "stat", lambda *a, **k: looked_at.append(a) or stat(*a, **k))
        open_data(str(tmp_path))
    assert len(scanned) >= 2 * CLASSES
    assert max(Counter(scanned).values()) == 1
    assert len(looked_at) < 3 * 2 * CLASSES  # not at each file
    tracemalloc.start()
    data = open_data(str(tmp_path))
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    count = TRAINING + VALIDATION
    folders = 2 * CLASSES * (len(str(tmp_path)) + 100)
    assert kept < folders + 60 * count  # paths in a list would take more than twice as much
    assert most < folders + 140 * count
    assert [len(data.labels(part)) for part in ("fit", "holdout")] == [18_000, 1000]
