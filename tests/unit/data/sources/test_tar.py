"""Images in tars: their classes, and what is refused."""

import bz2
import gzip
import lzma
import random
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from forms import (
    CLASSES,
    add,
    as_folder,
    as_tar,
    as_tar_of_tars,
    everything,
    png,
    refusal,
    write_tar,
)

from ricciq.data.open import open_data
from ricciq.data.sources.tar import files_in_tar
from ricciq.errors import DataError


def targets(root: Path) -> tuple[list[str], dict[str, list[int]]]:
    data = open_data(str(root), None)
    return data.class_names, {s: p.targets.tolist() for s, (p, _) in data._splits.items()}


def both_splits(root: Path, files: list[tuple[str, bytes]]) -> Path:
    for split in ("train", "val"):
        write_tar(root / f"{split}.tar", files)
    return root


def test_a_split_may_be_a_folder_and_the_other_a_tar(tmp_path):
    as_folder(tmp_path)
    as_tar(tmp_path / "tars")
    for path in (tmp_path / "val").rglob("*.png"):
        path.unlink()
    for class_name in CLASSES:
        (tmp_path / "val" / class_name).rmdir()
    (tmp_path / "val").rmdir()
    (tmp_path / "tars" / "val.tar").rename(tmp_path / "validation.tar")
    assert targets(tmp_path)[1]["val"] == [0, 0, 1, 1]


def test_a_folder_goes_before_a_tar_of_the_same_name(tmp_path):
    as_folder(tmp_path)
    (tmp_path / "train.tar").write_bytes(b"left over")
    assert len(everything(str(tmp_path), None)["val"][0]) == 4


def test_the_innermost_folder_is_the_class_in_timm_order(tmp_path):
    files = [(f"sets/pets/{name}/{i}.JPEG", png(i)) for name in ("10", "9") for i in (10, 9)]
    names, found = targets(both_splits(tmp_path, files))
    assert names == ["9", "10"]
    assert found["val"] == [0, 0, 1, 1]
    images, _ = open_data(str(tmp_path), None)._splits["val"]
    assert images.name(0) == f"sets/pets/9/9.JPEG in {tmp_path / 'val.tar'}"


def test_folders_in_a_class_tar_go_before_its_name(tmp_path):
    for split in ("train", "val"):
        write_tar(tmp_path / split / "cat.tar", [("a.png", png(1)), ("lion/b.png", png(2))])
    assert targets(tmp_path)[0] == ["cat", "lion"]


def test_labels_are_those_of_timm(tmp_path):
    from timm.data.readers.reader_image_in_tar import extract_tarinfos

    as_tar_of_tars(tmp_path)
    names, found = targets(tmp_path)
    for split in ("train", "val"):
        infos, labels, classes, _ = extract_tarinfos(str(tmp_path / f"{split}.tar"))
        assert list(classes) == names
        assert sorted(labels.tolist()) == found["fit" if split == "train" else "val"]
        assert len(infos) == len(labels)


def test_hidden_files_are_ignored_in_tars_as_in_folders(tmp_path):
    hidden = ["._a.png", ".DS_Store", ".cache/b.png", "cat/._0.png", "cat/.old/0.png"]
    files = [(name, b"no image") for name in hidden]
    both_splits(tmp_path, [*files, ("cat/0.png", png(0)), ("cat/1.png", png(1))])
    assert targets(tmp_path)[1]["val"] == [0, 0]
    folder = tmp_path / "folder"
    as_folder(folder)
    (folder / "val" / "cat" / "._0.png").write_bytes(b"no image")
    (folder / "val" / "cat" / ".old").mkdir()
    (folder / "val" / "cat" / ".old" / "0.png").write_bytes(b"no image")
    assert len(everything(str(folder), None)["val"][0]) == 4


@pytest.mark.parametrize("name", ["../../cat/0.png", "/etc/cat/0.png", "cat/../../cat/0.png"])
def test_names_that_lead_out_of_a_tar_lead_nowhere(tmp_path, name):
    both_splits(tmp_path / "data", [(name, png(0)), ("cat/1.png", png(1))])
    assert targets(tmp_path / "data")[0] == ["cat"]
    assert len(everything(str(tmp_path / "data"), None)["val"][0]) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "train.tar", "val.tar"]


# What is refused


def test_a_tar_without_images_is_named(tmp_path):
    both_splits(tmp_path, [])
    refusal(str(tmp_path), None, str(tmp_path / "train.tar"), "has no images", ".png")


def test_a_class_tar_without_images_is_named(tmp_path):
    for split in ("train", "val"):
        write_tar(tmp_path / split / "cat.tar", [("0.png", png(0)), ("1.png", png(1))])
        write_tar(tmp_path / split / "dog.tar", [("notes.txt", b"later")])
    refusal(str(tmp_path), None, str(tmp_path / "train" / "dog.tar"), "has no images")


def test_an_empty_file_is_no_tar(tmp_path):
    as_tar(tmp_path)
    (tmp_path / "val.tar").write_bytes(b"")
    refusal(str(tmp_path), None, str(tmp_path / "val.tar"), "cannot be read", "pack it again")


def test_what_is_no_tar_at_all_is_named(tmp_path):
    as_tar(tmp_path)
    (tmp_path / "val.tar").write_bytes(b"this is no tar" * 100)
    refusal(str(tmp_path), None, str(tmp_path / "val.tar"), "cannot be read")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("inner", [False, True])
def test_a_compressed_tar_is_refused_whatever_it_is_called(tmp_path, compress, inner):
    as_tar(tmp_path)
    path = tmp_path / "train.tar"
    content = compress(path.read_bytes())
    if inner:
        write_tar(path, [("cat.tar", content)])
        refusal(str(tmp_path), None, f"cat.tar in {path}", "is compressed with", "unpack")
    else:
        path.write_bytes(content)
        refusal(str(tmp_path), None, str(path), "is compressed with", "unpack")


@pytest.mark.parametrize("name", ["train.tar.gz", "train.tgz"])
def test_a_tar_that_says_it_is_compressed_is_refused(tmp_path, name):
    as_tar(tmp_path)
    (tmp_path / "train.tar").rename(tmp_path / name)
    refusal(str(tmp_path), None, name, "is compressed")
    (tmp_path / "train").mkdir()
    (tmp_path / name).rename(tmp_path / "train" / name)
    refusal(str(tmp_path), None, name, "is compressed")


@pytest.mark.parametrize("nested", [False, True])
def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path, nested):
    """tarfile itself takes most of these ends for the end of the archive."""
    (as_tar_of_tars if nested else as_tar)(tmp_path)
    path = tmp_path / "train.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset  # of the end mark
    for cut in {*range(0, end, 512), *range(100, end, 1000), end, end + 100}:
        path.write_bytes(whole[:cut])
        refusal(str(tmp_path), None, str(path))
    path.write_bytes(whole[: end + 1024])
    everything(str(tmp_path), None)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    as_tar(tmp_path)
    path = tmp_path / "train.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        offsets = [entry.offset for entry in tar]
    for offset in offsets[1:4]:
        damaged = bytearray(whole)
        damaged[offset + 150] ^= 0xFF  # in the checksum
        path.write_bytes(damaged)
        refusal(str(tmp_path), None, str(path), "pack it again")


def test_tars_in_one_file_are_refused(tmp_path):
    as_tar(tmp_path)
    path = tmp_path / "train.tar"
    path.write_bytes(path.read_bytes() * 2)
    refusal(str(tmp_path), None, str(path), "two tars in one")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_pipes_are_refused(tmp_path, kind):
    as_tar(tmp_path)
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        add(tar, "cat/linked.png", type=kind, linkname="/etc/passwd")
    refusal(str(tmp_path), None, "cat/linked.png", "--dereference")


def rewrite_size(path: Path, name: str, size: bytes) -> None:
    """Change the size in a header, twelve bytes, and its checksum."""
    whole = bytearray(path.read_bytes())
    start = whole.index(name.encode())
    whole[start + 124 : start + 136] = size
    whole[start + 148 : start + 156] = b" " * 8
    whole[start + 148 : start + 156] = b"%06o\0 " % sum(whole[start : start + 512])
    path.write_bytes(whole)


@pytest.mark.parametrize(
    "size", [b"77777777777\0", b"\x80" + b"\0" * 3 + b"\xff" * 8, b"\xff" * 10 + b"\xfe\0"]
)
def test_an_impossible_size_is_refused_without_reading_it(tmp_path, size):
    both_splits(tmp_path, [("cat/0.png", png(0)), ("cat/1.png", png(1))])
    rewrite_size(tmp_path / "train.tar", "cat/1.png", size)
    refusal(str(tmp_path), None, str(tmp_path / "train.tar"), "cat/1.png", "copy it again")


def test_a_long_name_of_impossible_length_is_refused(tmp_path):
    both_splits(tmp_path, [("cat/" + "x" * 200 + ".png", png(0)), ("cat/1.png", png(1))])
    for size in (b"77777777777\0", b"\xff" * 10 + b"\xfe\0"):
        rewrite_size(tmp_path / "train.tar", "././@PaxHeader", size)
        refusal(str(tmp_path), None, str(tmp_path / "train.tar"))


def test_a_file_that_comes_twice_is_refused(tmp_path):
    both_splits(tmp_path, [("cat/0.png", png(0)), ("./cat/0.png", png(1))])
    refusal(str(tmp_path), None, "cat/0.png 2 times")


def test_an_image_in_no_class_is_named(tmp_path):
    both_splits(tmp_path, [("cat/0.png", png(0)), ("stray.png", png(1))])
    refusal(str(tmp_path), None, "stray.png in", "no class folder")


def test_tars_two_levels_deep_are_refused(tmp_path):
    deep = write_tar(tmp_path / "deep.tar", [("0.png", png(0))])
    middle = write_tar(tmp_path / "middle.tar", [("deep.tar", deep.read_bytes())])
    both_splits(tmp_path / "data", [("middle.tar", middle.read_bytes())])
    refusal(str(tmp_path / "data"), None, "deep.tar", "a tar within a tar")


def test_class_folders_and_tars_are_not_mixed(tmp_path):
    as_folder(tmp_path)
    write_tar(tmp_path / "train" / "emu.tar", [("0.png", png(0))])
    refusal(str(tmp_path), None, "emu.tar", "keep one kind")


def test_different_classes_in_two_tars_are_named(tmp_path):
    as_tar(tmp_path)
    write_tar(tmp_path / "val.tar", [("cat/0.png", png(0)), ("emu/0.png", png(1))])
    refusal(str(tmp_path), None, "dog, emu in one only")


def test_a_sparse_file_is_refused(tmp_path):
    sparse = tarfile.TarInfo("cat/0.png")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    (tmp_path / "one.tar").write_bytes(sparse.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    with pytest.raises(DataError, match=r"cat/0\.png in .* is not a regular file"):
        files_in_tar(tmp_path / "one.tar")


def test_old_tars_and_long_names_are_read(tmp_path):
    for number, kind in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = tmp_path / f"{number}.tar"
        name = "/".join(["x" * 90] * 2) + "/ä.png"
        with tarfile.open(path, "w", format=kind) as tar:
            add(tar, name, png(0))
        (member,) = files_in_tar(path)
        assert member.name == name
        assert member.read() == png(0)
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT))
    header[257:265] = b"\0" * 8  # as before there was "ustar"
    header[148:156] = b"%06o\0 " % sum(bytes(header[:148]) + b" " * 8 + bytes(header[156:]))
    (tmp_path / "v7.tar").write_bytes(bytes(header) + b"\0" * 1024)
    assert [member.name for member in files_in_tar(tmp_path / "v7.tar")] == ["a.png"]


def test_random_damage_never_ends_in_a_traceback(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{'long' * 30}/{i}.png", png(i)) for i in range(3)])
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 3, 50))):
            damaged[draw.randrange(1600)] = draw.randrange(256)
        path.write_bytes(damaged)
        with suppress(DataError):
            files = files_in_tar(path)
            assert len(files) == 3
            assert all(len(file.read()) == file.size for file in files)


def test_what_is_no_image_in_a_tar_is_named(tmp_path):
    files = [(f"{name}/0.png", png(1)) for name in CLASSES] + [("cat/a.heic", b"?")]
    (message,) = open_data(str(both_splits(tmp_path, files))).messages
    assert f"cat/a.heic in {tmp_path / 'train.tar'}" in message
