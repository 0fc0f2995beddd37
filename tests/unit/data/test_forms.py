"""The same images in every form of --data give the same batches, or the same kind of refusal."""

import shutil

import pytest
import torch
from forms import COUNTS, FORMS, as_parquet, batches, drain, everything, png, refusal

from ricciq.data.augmentation import Augmentation
from ricciq.data.loader import set_epoch
from ricciq.data.open import open_data
from ricciq.errors import DataError


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The images and targets of the folder form."""
    return everything(*FORMS["folder"](tmp_path_factory.mktemp("folder")))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_have_the_same_content(form, workers, tmp_path, expected):
    name, root = FORMS[form](tmp_path)
    found = everything(name, root, workers=workers)
    assert len(found["val"][0]) == 2 * COUNTS["val"]
    for split, batch in expected.items():
        assert same(found[split], batch), split
    data = open_data(name, root)
    assert data.class_names == (["0", "1"] if form == "shards" else ["cat", "dog"])
    assert data.channels == 3
    assert data.name == name


@pytest.mark.parametrize("form", ["tar of tars", "shards", "parquet"])
def test_order_and_augmentation_do_not_depend_on_workers(form, tmp_path):
    data = open_data(*FORMS[form](tmp_path))
    varied = Augmentation(no_aug=False, color_jitter=0.4, reprob=0.5, mixup=0.2)
    epochs = []
    for workers in (0, 2):
        loader = batches(data, training=True, augmentation=varied, workers=workers)
        for epoch in (0, 1):
            set_epoch(loader, epoch)
            epochs.append(drain(loader))
    assert same(epochs[0], epochs[2])
    assert same(epochs[1], epochs[3])
    assert not same(epochs[0], epochs[1])
    set_epoch(loader, 1, skip_batches=2)
    assert same(drain(loader), [part[8:] for part in epochs[1]])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", COUNTS)
def test_a_damaged_image_names_itself(form, split, tmp_path, monkeypatch):
    bad = 1000 * (split == "val") + 101
    monkeypatch.setattr("forms.png", lambda value: png(value)[: 100 if value == bad else None])
    name, root = FORMS[form](tmp_path)
    row = "9 of split train" if split == "train" else "3 of split validation"
    shown = {"shards": "dog/1.png in", "parquet": f"{row} of data '{name}'"}
    refusal(name, root, "cannot be read", shown.get(form, "1.png"))


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"parquet"}))  # whose bytes stay mapped
def test_what_disappears_after_it_was_listed_is_named(form, tmp_path):
    name, root = FORMS[form](tmp_path)
    data = open_data(name, root)
    for path in sorted(tmp_path.iterdir()):
        if path.name != "cache":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=r"image .* cannot be read"):
        drain(batches(data, "val"))


def test_nothing_is_written_beside_the_images(tmp_path):
    name, root = as_parquet(tmp_path / "parquet")
    before = sorted((tmp_path / "parquet" / "pets").iterdir())
    everything(name, root)
    assert sorted((tmp_path / "parquet" / "pets").iterdir()) == before
    for form in ("tar", "class tars", "tar of tars", "shards"):
        name, root = FORMS[form](tmp_path / form)
        before = sorted((tmp_path / form).rglob("*"))
        everything(name, root)
        assert sorted((tmp_path / form).rglob("*")) == before
