"""Webdataset shards: which are read, how samples are labelled, and what is refused."""

import json
from pathlib import Path

import pytest
import webdataset
from forms import COUNTS, as_shards, batches, drain, everything, png, refusal, samples, write_tar

from ricciq.data.open import open_data
from ricciq.errors import UsageError


@pytest.fixture
def root(tmp_path) -> Path:
    as_shards(tmp_path)
    return tmp_path


def shards(root: Path, split: str) -> list[str]:
    return sorted(path.name for path in root.glob(f"*{split}*"))


def write_info(root: Path, name="_info.json", val="validation", **more) -> None:
    """The info file of timm's own data sets."""
    splits = {
        split: {
            "name": split,
            "num_samples": 2 * COUNTS[part],
            "filenames": shards(root, part),
            "shard_lengths": [5] * len(shards(root, part)),
        }
        for split, part in (("train", "train"), (val, "val"))
    }
    (root / name).write_text(json.dumps({"splits": splits} | more))


def change_info(root: Path, split="train", **values) -> None:
    write_info(root)
    info = json.loads((root / "_info.json").read_text())
    info["splits"][split] |= values
    (root / "_info.json").write_text(json.dumps(info))


def write_sample(root: Path, files: list[tuple[str, bytes]]) -> str:
    """A training split with one sample of these files; returns its shard."""
    for path in root.glob("*train*"):
        path.unlink()
    return str(write_tar(root / "train.tar", files))


def test_samples_are_those_that_webdataset_reads(root):
    names = [str(root / name) for name in shards(root, "val")]
    read = webdataset.WebDataset(names, shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
    images, indices = open_data("wds/pets", root)._splits["val"]
    found = list(read)
    assert len(found) == len(indices) == 4
    for index, (pixels, target) in enumerate(found):
        assert images.targets[index] == target
        assert (pixels == images.open(index, "RGB")).all()


@pytest.mark.parametrize("name", ["_info.json", "info.json"])
@pytest.mark.parametrize("val", ["validation", "val"])
def test_the_info_file_says_which_shards_a_split_has(root, name, val):
    write_info(root, name, val)
    expected = everything("wds/pets", root)
    for number, path in enumerate(sorted(root.glob("*.tar"))):
        path.rename(root / f"{number}.tar")
    info = json.loads((root / name).read_text())
    info["splits"]["train"]["filenames"] = ["0.tar", "1.tar", "2.tar", "3.tar"]
    info["splits"][val]["filenames"] = ["4.tar"]
    (root / name).write_text(json.dumps(info))
    found = everything("wds/pets", root)
    assert all((found[s][0] == expected[s][0]).all() for s in expected)


@pytest.mark.parametrize("key", ["class_names", "classes"])
def test_class_names_come_from_the_info_file(root, key):
    write_info(root, **{key: ["cat", "dog", "emu"]})
    assert open_data("wds/pets", root).class_names == ["cat", "dog", "emu"]


def test_without_names_there_are_classes_up_to_the_highest_label(root):
    write_tar(root / "x-train-9.tar", [("a.png", png(0)), ("a.cls", b" 4\n")])
    assert open_data("wds/pets", root).class_names == ["0", "1", "2", "3", "4"]


def test_other_files_of_a_sample_and_notes_are_left_alone(root):
    files = [("a.seg.png", png(3)), ("a.JPG", png(1)), ("a.cls", b"0"), ("a.txt", b"a cat")]
    files += [("README", b""), ("._b.png", b""), ("__notes__", b""), ("__notes__/c.png", b"")]
    files += [("d/a.webp", png(2)), ("d/a.cls", b"1")]
    write_sample(root, files)
    data = open_data("wds/pets", root)
    names = [data._splits["fit"][0].name(i).split(" in ")[0] for i in range(2)]
    assert names == ["a.JPG", "d/a.webp"]


# What is refused


def test_a_root_is_needed():
    with pytest.raises(UsageError, match="'wds/pets' needs --data-dir"):
        open_data("wds/pets", None)


@pytest.mark.parametrize("root", ["http://a.example/b", "pipe:cat b", "s3://a/b"])
def test_remote_shards_are_refused(root, tmp_path):
    refusal("wds/pets", Path(root), "stream", "copy them", "--data-dir")
    as_shards(tmp_path)
    change_info(tmp_path, filenames=[f"{root}/train-0.tar"])
    refusal("wds/pets", tmp_path, "stream", "copy them")


def test_a_folder_without_shards_is_named(tmp_path):
    refusal("wds/pets", tmp_path / "nowhere", "nowhere", "*train*.tar", "_info.json")
    as_shards(tmp_path)
    for path in tmp_path.glob("*val*"):
        path.unlink()
    refusal("wds/pets", tmp_path, "*val*.tar")


@pytest.mark.parametrize("text", ["{", "[]", '{"splits": 3}', '{"splits": {"train": {}}}', "\0"])
def test_a_damaged_info_file_is_named(root, text):
    (root / "_info.json").write_text(text)
    refusal("wds/pets", root, str(root / "_info.json"), "correct it")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"filenames": []}, ("lists no shards", "train")),
        ({"filenames": ["missing.tar"]}, ("missing.tar", "cannot be read")),
        ({"filenames": ["../pets.tar"]}, ("../pets.tar", "elsewhere")),
        ({"filenames": ["/pets.tar"]}, ("/pets.tar", "elsewhere")),
        ({"filenames": ["pets-train-0000.tar"] * 2}, ("pets-train-0000.tar", "2 times")),
        ({"filenames": ["pets-val-0000.tar"]}, ("pets-val-0000.tar", "2 times")),
        ({"num_samples": 17}, ("have 16", "says 17")),
        ({"num_samples": 15}, ("have 16", "says 15")),
        ({"alt_label": "breed"}, ("'breed'", ".cls")),
    ],
)
def test_an_info_file_that_does_not_fit_is_refused(root, values, words):
    change_info(root, **values)
    refusal("wds/pets", root, "_info.json" if "missing" not in str(values) else "", *words)


def test_an_info_file_without_validation_is_refused(root):
    write_info(root, val="test")
    refusal("wds/pets", root, "validation or val", "train, test")


def test_a_label_beyond_the_class_names_is_named(root):
    write_info(root, class_names=["cat"])
    refusal("wds/pets", root, "dog/0.png in", "is 1", "1 class names")


@pytest.mark.parametrize(
    "label", [b"", b"cat", b"-1", b"1.0", b"1 2", b"\xff", b"1234567", b"1" * 100, b"0x1"]
)
def test_a_label_that_is_no_number_is_named(root, label):
    shard = write_sample(root, [("a/b.png", png(0)), ("a/b.cls", label)])
    refusal("wds/pets", root, f"a/b.cls in {shard}", "whole number")


@pytest.mark.parametrize(
    "files",
    [
        [("a/b.png", png(0))],
        [("a/b.cls", b"0")],
        [("a/b.cls", b"0"), ("a/b.txt", b"")],
        [("a/b.cls", b"0"), ("a/b.png", png(0)), ("a/b.jpg", png(0))],
        [("a/b.cls", b"0"), ("a/b.x.png", png(0))],
    ],
)
def test_a_sample_without_one_image_and_one_label_is_named(root, files):
    shard = write_sample(root, files)
    refusal("wds/pets", root, f"sample a/b in {shard}", files[0][0][4:], "one label (cls)")


def test_a_sample_that_comes_twice_is_named(root):
    sample, other = ([(f"{key}.png", png(0)), (f"{key}.cls", b"0")] for key in "ab")
    shard = write_sample(root, [*sample, *other, ("a.txt", b"")])
    refusal("wds/pets", root, f"shard {shard} has sample a twice")
    shard = write_sample(root, [*sample, ("a.PNG", png(1))])
    refusal("wds/pets", root, f"shard {shard} has sample a twice")
    shard = write_sample(root, [*sample, ("a.png", png(1))])
    refusal("wds/pets", root, f"{shard} has a.png 2 times")


@pytest.mark.parametrize("files", [[], [("README", b"")]])
def test_a_shard_without_samples_is_named(root, files):
    refusal("wds/pets", root, f"shard {write_sample(root, files)} has no samples")


def test_a_truncated_shard_is_named(root):
    path = root / "pets-train-0001.tar"
    whole = path.read_bytes()
    for cut in range(0, 12000, 512):
        path.write_bytes(whole[:cut])
        refusal("wds/pets", root, str(path))


def test_an_epoch_can_be_entered_in_the_middle(root):
    from ricciq.data.loader import set_epoch

    loader = batches(open_data("wds/pets", root), training=True)
    set_epoch(loader, 3)
    whole = drain(loader)
    set_epoch(loader, 3, skip_batches=1)
    assert (drain(loader)[0] == whole[0][4:]).all()
    assert len(list(samples("train"))) == 16
