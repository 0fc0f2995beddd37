"""Every form of --data: what is read, what is refused, and what is deterministic."""

import multiprocessing
import os
import random
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fashion import lay_out_fashion_mnist, needs_fashion
from PIL import Image
from sklearn.datasets import load_digits

from ricciq.data.augmentation import Augmentation
from ricciq.data.dataset import ImageData
from ricciq.data.loader import MOST_WORKERS, close, set_epoch
from ricciq.data.open import open_data, open_to_evaluate
from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import DataError, UsageError
from ricciq.system.distributed import World

TINY = Preprocessing((3, 16, 16), (0.5,) * 3, (0.25,) * 3)
GREY = Preprocessing((1, 8, 8), (0.25,), (0.5,))


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (20, 16), mode="RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(value)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, eight training and two validation images each."""
    for split, count in (("train", 8), ("val", 2)):
        for label, class_name in enumerate(("cat", "dog")):
            for i in range(count):
                write_image(tmp_path / split / class_name / f"{i}.png", 100 * label + i)
    return tmp_path


def batches(data: ImageData, split="fit", preprocessing=TINY, **options):
    defaults = {"batch_size": 4, "workers": 0, "training": False}
    return data.loader(split, preprocessing, **(defaults | options))


def drain(loader):
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def one_sentence(error: pytest.ExceptionInfo, *words: str) -> None:
    """The message is one sentence with these words, without a traceback."""
    message = str(error.value)
    assert len(error.value.args) == 1
    assert "\n" not in message
    assert "Traceback" not in message
    for word in words:
        assert word in message


# Folders


def test_a_folder_becomes_normalized_batches(folder):
    data = open_data(str(folder), None)
    assert (data.class_names, data.num_classes, data.grey, data.channels) == (
        ["cat", "dog"],
        2,
        False,
        3,
    )
    images, targets = drain(batches(data, "val"))
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert targets.tolist() == [0, 0, 1, 1]
    first = Image.open(folder / "val" / "cat" / "0.png").crop((2, 0, 18, 16))
    pixels = torch.from_numpy(np.array(first)).permute(2, 0, 1) / 255
    torch.testing.assert_close(images[0], (pixels - 0.5) / 0.25)


@pytest.mark.parametrize("name", ["validation", "valid", "VAL", "Validation"])
def test_other_names_of_the_validation_images(folder, name):
    (folder / "val").rename(folder / name)
    (folder / "train").rename(folder / "Train")
    assert len(drain(batches(open_data(str(folder), None), "val"))[1]) == 4


def test_classes_are_in_timm_order_and_images_may_be_nested(tmp_path):
    for split in ("train", "val"):
        for class_name in ("10", "9"):
            for i in range(2):
                write_image(tmp_path / split / class_name / "deeper" / f"{i}.png", i)
    data = open_data(str(tmp_path), None)
    assert data.class_names == ["9", "10"]
    assert drain(batches(data, "val"))[1].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["no/such/folder", "imagenet", "torch", "wds"])
def test_an_unknown_name_lists_the_forms(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        open_data(name, None)
    one_sentence(error, repr(name), "train/", "digits", "torch/NAME")


@pytest.mark.parametrize("name", ["tfds/mnist", "hfids/mnist"])
def test_a_form_that_is_a_stream_is_refused(name):
    with pytest.raises(DataError) as error:
        open_data(name, None)
    one_sentence(error, name, "hfds/NAME", "wds/NAME")


def test_a_folder_without_train_is_refused(folder):
    (folder / "train").rename(folder / "images")
    with pytest.raises(DataError) as error:
        open_data(str(folder), None)
    one_sentence(error, str(folder), "neither train/ nor train.tar")


def test_a_folder_without_validation_is_refused(folder):
    # timm would evaluate on the training images.
    (folder / "val").rename(folder / "others")
    with pytest.raises(DataError) as error:
        open_data(str(folder), None)
    one_sentence(error, str(folder), "neither val/ nor validation/")


def test_test_images_alone_are_those_of_validation(folder):
    (folder / "val").rename(folder / "test")
    data = open_data(str(folder), None)
    assert data.count("val") == 4
    assert data.messages == [
        f"{folder / 'test'} is used for validation: there is no {folder / 'val'}"
    ]


def test_evaluating_needs_no_training_images(folder):
    shutil.rmtree(folder / "train")
    for place in (folder, folder / "val"):  # the latter has class folders and no parts
        data = open_to_evaluate(str(place))
        assert data.class_names == ["cat", "dog"]
        assert drain(batches(data, "val"))[1].tolist() == [0, 0, 1, 1]
        assert not data.messages


def test_the_test_images_are_evaluated_if_asked_for_or_alone(folder):
    for number in range(3):
        write_image(folder / "test" / "dog" / f"{number}.png", number)
    assert open_to_evaluate(str(folder), split="test").count("val") == 3
    assert open_to_evaluate(str(folder)).count("val") == 4
    shutil.rmtree(folder / "val")
    alone = open_to_evaluate(str(folder))
    assert alone.count("val") == 3
    assert alone.messages == [f"{folder / 'test'} is evaluated: there is no {folder / 'val'}"]


def test_a_split_that_is_missing_is_named(folder):
    with pytest.raises(DataError) as error:
        open_to_evaluate(str(folder), split="test")
    one_sentence(error, str(folder / "train"), str(folder / "val"), "no test/")
    shutil.rmtree(folder / "val")
    with pytest.raises(DataError) as error:
        open_to_evaluate(str(folder))
    one_sentence(error, str(folder / "train"), "no val/")
    with pytest.raises(DataError, match="'digits' has no split test"):
        open_to_evaluate("digits", split="test")


RUBBISH = ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/cat/._0.png")
OTHERS = ("cat/a.heic", "cat/b.avif", "cat/c.svg", "cat/image", "cat/.hidden.png", "notes.csv")


def test_what_is_not_used_is_named_but_for_rubbish(folder):
    for name in (*RUBBISH, *(f"cat/{name}" for name in RUBBISH), ".ipynb_checkpoints/0.png"):
        path = folder / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    assert not open_data(str(folder)).messages
    for name in OTHERS:
        (folder / "train" / name).write_bytes(b"?")
        (message,) = open_data(str(folder)).messages
        assert str(folder / "train" / name) in message
        (folder / "train" / name).unlink()
    (folder / "test").mkdir()
    (folder / "README").touch()
    (message,) = open_data(str(folder)).messages
    assert f"not used: {folder / 'README'}, {folder / 'test'}/;" in message


def test_of_many_files_that_are_not_used_the_first_are_named(folder):
    for number in range(9):
        (folder / "val" / "cat" / f"{number}.heic").touch()
    (message,) = open_data(str(folder)).messages
    assert "4.heic and 4 more" in message
    assert "5.heic" not in message


@pytest.mark.parametrize("damage", ["empty", "link", "pipe"])
def test_bad_training_images_are_found_without_decoding_them(folder, damage):
    open_data(str(folder)).check_training_images()
    path = folder / "train" / "dog" / "1.png"
    path.unlink()
    make = {
        "empty": path.touch,
        "link": lambda: path.symlink_to(folder / "nowhere.png"),
        "pipe": lambda: os.mkfifo(path),
    }
    make[damage]()
    said = {"empty": "empty", "link": "No such file", "pipe": "not a regular file"}
    with pytest.raises(DataError) as error:
        open_data(str(folder)).check_training_images()
    one_sentence(error, str(path), said[damage])


def test_images_may_have_suffixes_in_capitals(folder):
    path = folder / "val" / "cat" / "0.png"
    path.rename(path.with_suffix(".PNG"))
    assert open_data(str(folder)).count("val") == 4


def test_a_split_without_class_folders_is_refused(tmp_path):
    write_image(tmp_path / "train" / "0.png")
    write_image(tmp_path / "val" / "0.png")
    with pytest.raises(DataError) as error:
        open_data(str(tmp_path), None)
    one_sentence(error, str(tmp_path / "train"), "neither class folders nor tars")


def test_an_empty_class_folder_is_named(folder):
    (folder / "train" / "emu").mkdir()
    (folder / "train" / "emu" / "notes.txt").write_text("later")
    with pytest.raises(DataError) as error:
        open_data(str(folder), None)
    one_sentence(error, str(folder / "train" / "emu"), ".png")


def test_an_image_outside_the_class_folders_is_named(folder):
    stray = write_image(folder / "train" / "stray.jpg")
    with pytest.raises(DataError) as error:
        open_data(str(folder), None)
    one_sentence(error, str(stray))


def test_different_classes_in_train_and_val_are_named(folder):
    write_image(folder / "val" / "emu" / "0.png")
    with pytest.raises(DataError) as error:
        open_data(str(folder), None)
    one_sentence(error, "emu", "val")


def test_a_single_training_image_is_refused(tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / split / "cat" / "0.png")
    with pytest.raises(DataError) as error:
        open_data(str(tmp_path), None)
    one_sentence(error, "single training image")


# Strict images


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def scribble(path: Path) -> None:
    path.write_bytes(b"this is no image")


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, scribble, remove])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("training", [False, True])
def test_a_bad_image_ends_the_run_and_is_named(folder, damage, workers, training):
    data = open_data(str(folder), None)
    bad = folder / ("train" if training else "val") / "dog" / "1.png"
    damage(bad)
    augmentation = Augmentation(no_aug=False) if training else None
    # The image may be in the hold-out; together the two splits hold every training image.
    for part in ("fit", "holdout") if training else ("val",):
        loader = batches(
            data, part, workers=workers, training=training, augmentation=augmentation, batch_size=2
        )
        try:
            drain(loader)
        except DataError as error:
            found = error
            break
    else:
        pytest.fail("the bad image went unnoticed")
    message = str(found)
    assert found.args == (message,)
    assert str(bad) in message
    assert "repair or remove it" in message
    assert "Traceback" not in message
    assert "\n" not in message


@pytest.mark.parametrize("limit", [200, 100], ids=["warning", "error"])
def test_a_decompression_bomb_is_refused(folder, monkeypatch, limit):
    # PIL warns from its limit on (20 * 16 = 320 pixels here), and raises from twice the limit on.
    data = open_data(str(folder), None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError) as error:
        drain(batches(data, "val"))
    one_sentence(error, str(folder / "val" / "cat" / "0.png"), "bomb")


def test_a_damaged_image_among_the_grey_probes_is_named(folder):
    bad = folder / "train" / "cat" / "0.png"
    scribble(bad)
    with pytest.raises(DataError) as error:
        open_data(str(folder), None)
    one_sentence(error, str(bad))


# Grey and colour


def test_a_folder_of_grey_images_is_grey_until_one_is_not(folder):
    for path in folder.rglob("*.png"):
        write_image(path, mode="L")
    assert open_data(str(folder), None).channels == 1
    write_image(folder / "train" / "dog" / "7.png")
    assert open_data(str(folder), None).channels == 3


def first_value(folder: Path, image: Image.Image, channels: int) -> list[int]:
    """The bytes that a one-coloured image is read as."""
    image.save(folder / "val" / "cat" / "0.png")
    plain = Preprocessing((channels, 16, 16), (0.0,) * channels, (1.0,) * channels)
    images, _ = drain(batches(open_data(str(folder), None), "val", plain))
    return (images[0, :, 8, 8] * 255).round().int().tolist()


def palette_image() -> Image.Image:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 200, 100, 0])
    return image


@pytest.mark.parametrize(
    ("image", "rgb", "grey"),
    [
        (Image.new("RGB", (16, 16), (200, 100, 0)), [200, 100, 0], [118]),
        (Image.new("RGBA", (16, 16), (200, 100, 0, 7)), [200, 100, 0], [118]),
        (palette_image(), [200, 100, 0], [118]),
        (Image.new("L", (16, 16), 90), [90, 90, 90], [90]),
        (Image.new("LA", (16, 16), (90, 7)), [90, 90, 90], [90]),
        (Image.new("I;16", (16, 16), 0x4000), [64, 64, 64], [64]),
        (Image.new("1", (16, 16), 1), [255] * 3, [255]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_is_converted(folder, image, rgb, grey):
    assert first_value(folder, image, 3) == rgb
    assert first_value(folder, image, 1) == grey


# Digits


def test_digits_need_no_download_and_are_scaled_to_bytes():
    data = open_data("digits", None)
    assert data.class_names == [str(n) for n in range(10)]
    assert (data.grey, data.channels) == (True, 1)
    plain = Preprocessing((1, 8, 8), (0.0,), (1.0,))
    parts = [drain(batches(data, split, plain)) for split in ("fit", "holdout", "val")]
    assert [len(targets) for _, targets in parts] == [1365, 72, 360]
    assert min(Counter(parts[2][1].tolist()).values()) >= 34  # 360 samples, stratified
    images = torch.cat([images for images, _ in parts])
    values = sorted(set((images * 255).round().int().flatten().tolist()))
    assert values == [round(v * 255 / 16) for v in range(17)]
    # The three parts are the 1,797 images, each once.
    truth = np.rint(load_digits().images * 255 / 16).astype(np.uint8).reshape(1797, 64)
    found = (images * 255).round().to(torch.uint8).reshape(1797, 64).numpy()
    assert sorted(map(bytes, found)) == sorted(map(bytes, truth))


@pytest.mark.parametrize("crop_pct", [1.0, 0.8])
def test_the_fast_path_gives_what_the_transform_gives(crop_pct):
    preprocessing = replace(GREY, crop_pct=crop_pct)
    data = open_data("digits", None)
    fast, _ = drain(batches(data, "val", preprocessing))
    images, indices = data._splits["val"]
    transform = preprocessing.evaluation_transform()
    slow = torch.stack([transform(images.open(int(i), "L")) for i in indices])
    assert torch.equal(fast, slow)


@pytest.mark.parametrize(
    "preprocessing",
    [
        replace(TINY, interpolation="bicubic", crop_pct=0.9),
        replace(TINY, input_size=(3, 20, 16), crop_mode="squash"),
        replace(TINY, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_mode="border"),
        GREY,
    ],
    ids=["center", "squash", "border", "grey"],
)
def test_pixels_are_images_that_are_not_normalized_yet(preprocessing):
    noise = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(preprocessing.mode)
    pixels = preprocessing.pixel_transform()(image)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, preprocessing.input_size)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    normalized = preprocessing.evaluation_transform()(image)
    assert torch.equal((pixels.float().div(255) - mean) / std, normalized)
    assert torch.equal(preprocessing.to_pixels(normalized), pixels)


@pytest.mark.parametrize("value", [0.004, 300.0, -1.0, float("nan")])
def test_what_was_not_made_from_pixels_does_not_become_pixels(value):
    images = torch.zeros(2, 1, 8, 8)
    images[1, 0, 3, 3] = value
    with pytest.raises(DataError, match=r"not pixels normalized with mean \(0.0,\) and std"):
        replace(GREY, mean=(0.0,), std=(1.0,)).to_pixels(images)


def test_grey_arrays_serve_colour_models_of_another_size():
    data = open_data("digits", None)
    images, _ = drain(batches(data, "val", TINY))
    assert images.shape == (360, 3, 16, 16)
    assert torch.equal(images[:, 0], images[:, 2])


# The hold-out and the subset


def in_split(data: ImageData, split: str) -> np.ndarray:
    return data._splits[split][1]


def test_the_holdout_is_five_percent_stratified_fixed_and_apart():
    data, again = open_data("digits", None), open_data("digits", None)
    fit, held_out = in_split(data, "fit"), in_split(data, "holdout")
    assert np.array_equal(held_out, in_split(again, "holdout"))
    assert not set(fit) & set(held_out)
    assert len(fit) + len(held_out) == 1437
    assert len(held_out) == round(0.05 * 1437)
    targets = drain(batches(data, "holdout", GREY))[1].tolist()
    assert set(Counter(targets).values()) <= {7, 8}


def test_a_larger_holdout_includes_the_default_one():
    usual, larger = open_data("digits", None), open_data("digits", None, holdout=0.4)
    assert set(in_split(usual, "holdout")) < set(in_split(larger, "holdout"))
    assert len(in_split(larger, "holdout")) == round(0.4 * 1437)
    together = [*in_split(larger, "fit"), *in_split(larger, "holdout")]
    assert sorted(together) == list(range(1437))


@pytest.mark.parametrize(
    ("sizes", "held_out"),
    [
        ([1, 2, 100], [0, 1, 4]),  # rare classes are held out once, a lone image never
        ([1, 1, 1, 1], None),  # nothing can be stratified: any one image
        ([2] + [1] * 60, [1] + [0] * 60),  # many lone images do not empty the other class
    ],
)
def test_rare_classes_in_the_holdout(tmp_path, sizes, held_out):
    for class_name, size in enumerate(sizes):
        write_image(tmp_path / "val" / str(class_name) / "0.png")
        for i in range(size):
            write_image(tmp_path / "train" / str(class_name) / f"{i}.png")
    data = open_data(str(tmp_path), None)
    images, _ = data._splits["fit"]
    counts = np.bincount(images.targets[in_split(data, "holdout")], minlength=len(sizes))
    if held_out is None:
        assert counts.sum() == 1
    else:
        assert counts.tolist() == held_out
        assert (np.bincount(images.targets[in_split(data, "fit")]) > 0).all()


def test_train_samples_is_fixed_stratified_and_leaves_the_holdout_alone():
    data = open_data("digits", None)

    def subset(count, seed):
        loader = batches(data, "fit", GREY, train_samples=count, seed=seed, training=True)
        return loader.dataset.indices

    some = subset(500, seed=0)
    assert len(some) == 500
    assert np.array_equal(some, subset(500, seed=1))
    assert set(subset(100, seed=0)) < set(some) < set(in_split(data, "fit"))
    targets = data._splits["fit"][0].targets[some]
    assert set(np.bincount(targets)) <= {48, 49, 50, 51, 52}


@pytest.mark.parametrize("count", [0, 1366])
def test_impossible_train_samples_are_refused(count):
    with pytest.raises(UsageError) as error:
        batches(open_data("digits", None), "fit", GREY, train_samples=count)
    one_sentence(error, f"train_samples {count}", "1365")


def test_train_samples_of_another_split_are_refused():
    with pytest.raises(UsageError) as error:
        batches(open_data("digits", None), "val", GREY, train_samples=5)
    one_sentence(error, "val")


# Order and augmentation are functions of (seed, epoch, index)


VARIED = Augmentation(
    no_aug=False, color_jitter=0.4, auto_augment="rand-m7-mstd0.5", reprob=0.5, pad_crop=2
)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_what_training_sees(folder, workers):
    data = open_data(str(folder), None)
    runs = []
    for count in (0, workers):
        loader = batches(data, training=True, augmentation=VARIED, workers=count, batch_size=3)
        for epoch in (0, 1):
            set_epoch(loader, epoch)
            runs.append(drain(loader))
    for here, there in ((0, 2), (1, 3)):
        assert torch.equal(runs[here][0], runs[there][0])
        assert torch.equal(runs[here][1], runs[there][1])
    assert not torch.equal(runs[0][0], runs[1][0])


def test_workers_live_across_epochs_until_the_loader_is_closed(folder):
    before = set(multiprocessing.active_children())  # of other tests
    loader = batches(
        open_data(str(folder), None), training=True, workers=1, persistent_workers=True
    )
    alive = []
    for epoch in (0, 1):
        set_epoch(loader, epoch)
        drain(loader)
        alive.append(set(multiprocessing.active_children()) - before)
    assert alive[0] == alive[1]
    assert len(alive[0]) == 1
    close(loader)
    assert not alive[0] & set(multiprocessing.active_children())


def test_workers_of_a_run_under_nohup_ignore_that_the_terminal_is_closed(folder, monkeypatch):
    monkeypatch.setattr("ricciq.data.loader.SECONDS_TO_CLOSE", 1)
    others = set(multiprocessing.active_children())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        loader = batches(open_data(str(folder)), batch_size=1, workers=1, persistent_workers=True)
        drain(loader)
        (worker,) = set(multiprocessing.active_children()) - others
        os.kill(worker.pid, signal.SIGHUP)
        worker.join(2)
        assert worker.is_alive()
        drain(loader)
        close(loader)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("batch_size", "cores", "processes", "expected"),
    [(1, 6, 1, 6), (1, 6, 4, 1), (1, 60, 1, MOST_WORKERS), (8, 6, 1, 0)],
    ids=["all cores", "shared cores", "at most", "few batches"],
)
def test_by_default_there_are_as_many_workers_as_cores(
    folder, monkeypatch, batch_size, cores, processes, expected
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    loader = batches(
        open_data(str(folder), None),
        workers=None,
        training=True,
        batch_size=batch_size,
        world=World(rank=0, size=processes),
    )
    assert loader.num_workers == expected


@pytest.mark.parametrize(("room", "expected"), [(10**9, 6), (768 * 8 * 2, 2), (768 * 7, 0)])
def test_workers_leave_room_in_shared_memory(folder, monkeypatch, room, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=room))
    loader = batches(open_data(str(folder), None), workers=None, batch_size=1)
    assert loader.num_workers == expected


def test_images_in_memory_need_no_workers():
    assert batches(open_data("digits", None), preprocessing=GREY, workers=None).num_workers == 0


def test_a_seed_and_an_epoch_can_be_repeated(folder):
    data = open_data(str(folder), None)

    def seen(seed, epoch):
        loader = batches(data, training=True, augmentation=VARIED, seed=seed)
        set_epoch(loader, epoch)
        random.random(), np.random.rand(), torch.rand(3)  # must not matter
        return drain(loader)[0]

    assert torch.equal(seen(3, 5), seen(3, 5))
    assert not torch.equal(seen(3, 5), seen(4, 5))
    assert not torch.equal(seen(3, 5), seen(3, 6))


def test_an_image_is_augmented_the_same_in_every_batch_and_subset(folder):
    data = open_data(str(folder), None)
    every = batches(data, training=True, augmentation=VARIED, batch_size=14).dataset
    few = batches(data, training=True, augmentation=VARIED, train_samples=5).dataset
    together = every.__getitems__(list(range(14)))
    for position, index in enumerate(few.indices):
        alone = few.__getitems__([position])
        same = every.indices.tolist().index(index)
        assert torch.equal(alone.pixels[0], together.pixels[same])
        assert torch.equal(alone.kept[0], together.kept[same])


def test_order_and_augmentation_each_depend_on_what_they_should(folder):
    data = open_data("digits", None)

    def order(seed, epoch):
        loader = batches(data, preprocessing=GREY, training=True, seed=seed)
        set_epoch(loader, epoch)
        return [position % len(loader.dataset) for position in loader.sampler]

    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2)
    assert order(1, 1) != order(2, 1)

    # All images equal, so that only the augmentation can tell them apart.
    for path in folder.rglob("*.png"):
        write_image(path, 1)
    data = open_data(str(folder), None)

    def varied(seed, epoch):
        loader = batches(data, training=True, augmentation=VARIED, seed=seed)
        start = epoch * len(loader.dataset)
        return loader.dataset.__getitems__([start, start + 1]).pixels

    assert torch.equal(varied(1, 1), varied(1, 1))
    assert not torch.equal(varied(1, 1), varied(1, 2))
    assert not torch.equal(varied(1, 1), varied(2, 1))
    assert not torch.equal(*varied(1, 1))


def test_an_epoch_can_be_entered_in_the_middle():
    data = open_data("digits", None)
    loader = batches(data, preprocessing=GREY, training=True, batch_size=100)
    set_epoch(loader, 2)
    whole = drain(loader)
    assert len(loader) == 13
    set_epoch(loader, 2, skip_batches=4)
    assert len(loader) == 9
    rest = drain(loader)
    assert torch.equal(rest[0], whole[0][400:])
    set_epoch(loader, 2)
    assert torch.equal(drain(loader)[1], whole[1])


def test_the_global_generators_are_left_alone(folder):
    data = open_data(str(folder), None)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    drain(batches(data, training=True, augmentation=VARIED))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_training_shuffles_and_drops_a_partial_batch_only_beside_a_full_one():
    data = open_data("digits", None)
    loader = batches(data, preprocessing=GREY, training=True, batch_size=1000)
    assert [len(targets) for _, targets in loader] == [1000]
    loader = batches(data, preprocessing=GREY, training=True, batch_size=2000)
    assert [len(targets) for _, targets in loader] == [1365]
    in_order = drain(batches(data, preprocessing=GREY, batch_size=2000))[1]
    shuffled = drain(loader)[1]
    assert not torch.equal(in_order, shuffled)
    assert torch.equal(in_order.sort().values, shuffled.sort().values)


def test_evaluation_keeps_every_image_in_order():
    data = open_data("digits", None)
    loader = batches(data, "val", GREY, batch_size=100)
    assert [len(targets) for _, targets in loader] == [100, 100, 100, 60]
    assert torch.equal(drain(loader)[0], drain(loader)[0])


def test_set_epoch_refuses_an_evaluation_loader():
    with pytest.raises(TypeError, match="training loader"):
        set_epoch(batches(open_data("digits", None), "val", GREY), 1)


# Augmentation


def is_varied(data, preprocessing, augmentation):
    loader = batches(data, "fit", preprocessing, training=True, augmentation=augmentation)
    samples = loader.dataset
    count = len(samples)
    first, second = samples.__getitems__([0, 1]), samples.__getitems__([count, count + 1])
    if first.kept is not None and not torch.equal(first.kept, second.kept):
        return True
    return not torch.equal(first.pixels, second.pixels)


@pytest.mark.parametrize(
    ("augmentation", "size", "varied"),
    [
        (None, 96, False),
        (Augmentation(), 64, False),
        (Augmentation(), 96, True),
        (Augmentation(no_aug=True), 96, False),
        (Augmentation(no_aug=False), 16, True),
        (Augmentation(pad_crop=2), 16, True),
        (Augmentation(no_aug=True, pad_crop=2), 16, False),
        (Augmentation(reprob=1.0), 16, True),
        (Augmentation(auto_augment="rand-m9-n3"), 16, True),
    ],
)
def test_when_images_are_varied(folder, augmentation, size, varied):
    preprocessing = Preprocessing((3, size, size), (0.5,) * 3, (0.25,) * 3)
    assert is_varied(open_data(str(folder), None), preprocessing, augmentation) is varied


def test_pad_crop_shifts_and_flips_at_native_size():
    data = open_data("digits", None)
    plain = Preprocessing((1, 8, 8), (0.0,), (1.0,))
    augmentation = Augmentation(pad_crop=1)
    samples = batches(data, "fit", plain, training=True, augmentation=augmentation).dataset
    original = batches(data, "fit", plain).dataset.__getitems__([0]).pixels
    padded = torch.nn.functional.pad(original[0, 0], (1, 1, 1, 1))
    windows = [padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    candidates = windows + [window.flip(-1) for window in windows]
    seen = set()
    for epoch in range(100):
        image = samples.__getitems__([epoch * len(samples)]).pixels
        matches = [n for n, c in enumerate(candidates) if torch.equal(image[0, 0], c)]
        assert matches
        seen.add(matches[0])
    assert len(seen) == 18


def test_grey_images_can_be_auto_augmented():
    data = open_data("digits", None)
    policy = Augmentation(no_aug=False, auto_augment="rand-m9-n3-mstd0.5", reprob=0.3)
    images, _ = drain(batches(data, "fit", GREY, training=True, augmentation=policy, batch_size=65))
    assert images.shape == (1365, 1, 8, 8)
    assert images.isfinite().all()


def test_an_unknown_policy_is_refused():
    with pytest.raises(UsageError) as error:
        batches(
            open_data("digits", None),
            preprocessing=GREY,
            training=True,
            augmentation=Augmentation(no_aug=False, auto_augment="sharpen"),
        )
    one_sentence(error, "'sharpen'", "rand-m7")


# torch/NAME


def test_torch_sets_need_a_root():
    with pytest.raises(UsageError) as error:
        open_data("torch/fashion_mnist", None)
    one_sentence(error, "torch/fashion_mnist", "--data-dir")


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_a_torch_set_without_files_says_how_to_get_them(tmp_path, name):
    with pytest.raises(DataError) as error:
        open_data(f"torch/{name}", tmp_path)
    one_sentence(error, f"torch/{name}", str(tmp_path), "torchvision.datasets.", "download=True")
    assert not any(tmp_path.iterdir())


def test_an_unknown_torch_set_names_the_known_ones(tmp_path):
    with pytest.raises(DataError) as error:
        open_data("torch/fashion", tmp_path)
    one_sentence(error, "torch/fashion'", "torch/fashion_mnist", "torch/cifar10")


@needs_fashion
def test_fashion_mnist(tmp_path):
    root = lay_out_fashion_mnist(tmp_path)
    data = open_data("torch/fashion_mnist", root)
    assert data.class_names[0] == "T-shirt/top"
    assert (data.num_classes, data.channels) == (10, 1)
    assert [len(in_split(data, s)) for s in ("fit", "holdout", "val")] == [57000, 3000, 10000]
    plain = Preprocessing((1, 28, 28), (0.0,), (1.0,))
    loader = batches(data, "fit", plain, train_samples=15000, training=True, batch_size=500)
    images, targets = drain(loader)
    assert images.shape == (15000, 1, 28, 28)
    assert targets.bincount().tolist() == [1500] * 10
    assert images.mean().item() == pytest.approx(0.2860, abs=2e-3)
    assert images.std().item() == pytest.approx(0.3530, abs=2e-3)
    (root / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(b"short")
    with pytest.raises(DataError) as error:
        open_data("torch/fashion_mnist", root)
    one_sentence(error, str(root), "damaged")


def test_a_colour_torch_set(tmp_path, monkeypatch):
    class Colour:
        classes = ("a", "b")
        data = np.zeros((6, 32, 32, 3), np.uint8)
        targets = (0, 1, 0, 1, 0, 1)

    monkeypatch.setattr("ricciq.data.sources.torchvision.create_dataset", lambda *_, **__: Colour())
    data = open_data("torch/cifar10", tmp_path)
    assert (data.channels, data.class_names) == (3, ["a", "b"])
    plain = Preprocessing((3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    assert drain(batches(data, "val", plain))[0].shape == (6, 3, 32, 32)


class Files:
    """A torchvision data set whose images are in files."""

    def __init__(self, root, split):
        self.root = root
        self.classes = [("tench", "Tinca tinca"), ("crane",)]
        self.wnids = ["n01", "n02"]
        self.imgs = [(str(root / split / f"{i}.png"), i % 2) for i in range(4)]
        self.targets = [target for _, target in self.imgs]


def test_torch_sets_in_files_are_opened_strictly(tmp_path, monkeypatch):
    for split in ("train", "validation"):
        for i in range(4):
            write_image(tmp_path / split / f"{i}.png", i)

    def create(name, root, split, download):
        assert (name, download) == ("torch/imagenet", False)
        return Files(Path(root), split)

    monkeypatch.setattr("ricciq.data.sources.torchvision.create_dataset", create)
    data = open_data("torch/imagenet", tmp_path)
    assert data.class_names == ["n01", "n02"]  # "crane" is the name of two classes
    assert drain(batches(data, "val"))[1].tolist() == [0, 1, 0, 1]
    scribble(tmp_path / "validation" / "2.png")
    with pytest.raises(DataError) as error:
        drain(batches(data, "val"))
    one_sentence(error, str(tmp_path / "validation" / "2.png"))


def test_places365(tmp_path, monkeypatch):
    """torchvision's lists of files, which it checks by their checksums."""
    monkeypatch.setattr("torchvision.datasets.places365.check_integrity", lambda *_, **__: True)
    (tmp_path / "categories_places365.txt").write_text("/a/abbey 0\n/a/alley 1\n")
    lists = {
        "places365_train_standard.txt": "data_large_standard",
        "places365_val.txt": "val_large",
    }
    for number, (name, folder) in enumerate(lists.items()):
        lines = [f"{i}.png {i % 2}" for i in range(4)]
        (tmp_path / name).write_text("\n".join(lines))
        for i in range(4):
            write_image(tmp_path / folder / f"{i}.png", 10 * number + i)
    data = open_data("torch/places365", tmp_path)
    assert data.class_names == ["/a/abbey", "/a/alley"]
    assert drain(batches(data, "val"))[1].tolist() == [0, 1, 0, 1]


def test_qmnist_labels_are_the_first_of_eight(tmp_path):
    raw = tmp_path / "QMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "test"):
        pixels = np.arange(4 * 28 * 28, dtype=np.uint8)
        sizes = np.array([0x0803, 4, 28, 28], ">i4").tobytes()
        (raw / f"qmnist-{split}-images-idx3-ubyte").write_bytes(sizes + pixels.tobytes())
        labels = np.array([[i % 2, *range(7)] for i in range(4)], ">i4")
        sizes = np.array([0x0C02, 4, 8], ">i4").tobytes()
        (raw / f"qmnist-{split}-labels-idx2-int").write_bytes(sizes + labels.tobytes())
    data = open_data("torch/qmnist", tmp_path)
    assert (data.num_classes, data.channels) == (10, 1)
    assert drain(batches(data, "val", GREY))[1].tolist() == [0, 1, 0, 1]


def test_an_image_folder_of_torch_needs_both_splits(tmp_path):
    # timm would take the root for both, and so train on what it evaluates.
    write_image(tmp_path / "cat" / "0.png")
    write_image(tmp_path / "cat" / "1.png")
    with pytest.raises(DataError) as error:
        open_data("torch/image_folder", tmp_path)
    one_sentence(error, "train/ and validation/", str(tmp_path))


@pytest.mark.parametrize("name", ["inaturalist", "inat"])
def test_a_set_with_many_labels_for_an_image_is_refused(tmp_path, name):
    with pytest.raises(DataError) as error:
        open_data(f"torch/{name}", tmp_path)
    one_sentence(error, f"torch/{name}", "seven labels", "as a folder")


@pytest.mark.parametrize("name", ["imagenet", "image_folder"])
def test_a_set_that_torchvision_cannot_fetch_does_not_offer_it(tmp_path, name):
    with pytest.raises(DataError) as error:
        open_data(f"torch/{name}", tmp_path / "nowhere")
    one_sentence(error, f"torch/{name}", "missing or damaged")
    assert "download" not in str(error.value)
