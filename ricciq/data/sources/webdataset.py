"""The form wds/NAME: webdataset shards on a disk, indexed for random access.

The webdataset library, which reads shards as streams, is not needed. Random access allows what
streams do not: a hold-out, an order that depends only on seed and epoch, and resuming in the middle
of an epoch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from pydantic import BaseModel, ValidationError

from ricciq.data.sources.base import Parts
from ricciq.data.sources.tar import ImagesInTars, Member, files_in_tar
from ricciq.errors import DataError
from ricciq.system.natural_order import natural_order

INFO_FILES = ("_info.json", "info.json")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
REMOTE = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
META = re.compile(r"__[^/]*__($|/)")
"""Files that webdataset takes as notes about a shard, not as samples."""
LABEL = re.compile(rb"\s*[0-9]{1,6}\s*")
"""At most six digits: the highest label sets the number of classes."""
LABEL_BYTES = 32

Sample = tuple[Member, int]


class _SplitInfo(BaseModel):
    filenames: list[str]
    num_samples: int | None = None
    alt_label: str = ""


class _Info(BaseModel):
    """The keys of the info file that are used, under timm's names."""

    splits: dict[str, _SplitInfo] = {}
    class_names: list[str] | None = None
    classes: list[str] | None = None


def open_source(name: str, root: Path | None) -> Parts:  # noqa: ARG001
    """Open a folder of webdataset shards.

    Args:
        name: wds/NAME, with any NAME.
        root: folder of the shards.

    Returns:
        The class names and both parts.

    Raises:
        DataError: a shard or the info file is missing or damaged, or a sample does not have exactly
            one image and one label.
    """
    assert root is not None, "the catalogue has needs_root"
    _refuse_remote(str(root))
    info = _read_info(root)
    splits = [_split(root, info, "train"), _split(root, info, "validation", "val")]
    listed = Counter(name for split in splits for name in split.filenames)
    for shard, count in listed.most_common(1):
        if count > 1:
            raise DataError(
                f"shard {root / shard} is listed {count} times; list each shard in one split only, "
                f"in {root / INFO_FILES[0]}"
            )
    train, val = (_read_split(root, split) for split in splits)
    return Parts(_class_names(info, train + val), _images(train), _images(val))


def _refuse_remote(place: str) -> None:
    if REMOTE.match(place):
        raise DataError(
            f"shards at {place} would be a stream, whose order cannot be reproduced; copy them "
            "to a folder and give it to --data-dir"
        )


def _read_info(root: Path) -> _Info:
    path = next((root / name for name in INFO_FILES if (root / name).is_file()), None)
    if path is None:
        return _Info()
    try:
        return _Info.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its top"
        raise DataError(
            f"{path} is invalid at {where} ({first['msg']}); correct it, or remove it to find the "
            "shards by their names"
        ) from None


def _split(root: Path, info: _Info, *names: str) -> _SplitInfo:
    """The split with one of these names in the info file; without one, found by file names."""
    if not info.splits:
        # The shortest name is in all the others: "val" in "validation".
        pattern = f"*{min(names, key=len)}*.tar"
        shards = sorted((path.name for path in root.glob(pattern)), key=natural_order)
        if not shards:
            raise DataError(
                f"folder {root} has neither shards called {pattern} nor an {INFO_FILES[0]}; rename "
                "the shards, or give their folder to --data-dir"
            )
        return _SplitInfo(filenames=shards)
    split = next((info.splits[name] for name in names if name in info.splits), None)
    if split is None or not split.filenames:
        raise DataError(
            f"{INFO_FILES[0]} in {root} lists no shards of a split called {' or '.join(names)}, "
            f"only {', '.join(info.splits)}; add it"
        )
    if split.alt_label:
        raise DataError(
            f"{INFO_FILES[0]} in {root} takes labels from {split.alt_label!r} in json files; write "
            "them as .cls files, each with a class number"
        )
    for name in split.filenames:
        _refuse_remote(name)
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(
                f"{INFO_FILES[0]} in {root} lists shard {name}, which is elsewhere; list only "
                "shards of its own folder"
            )
    return split


def _read_split(root: Path, split: _SplitInfo) -> list[Sample]:
    samples = [sample for name in split.filenames for sample in _samples(root / name)]
    if split.num_samples not in (None, len(samples)):
        raise DataError(
            f"shards {split.filenames[0]} to {split.filenames[-1]} in {root} have {len(samples)} "
            f"samples, but {INFO_FILES[0]} says {split.num_samples}; add the missing shards, or "
            "correct the number"
        )
    return samples


def _samples(shard: Path) -> Iterator[Sample]:
    """The image and the label of every sample in a shard."""
    files = [file for file in files_in_tar(shard) if not META.match(file.name)]
    keyed = [(*_key_and_extension(file.name), file) for file in files]
    seen: set[str] = set()
    # webdataset's rule: neighbours with the same key are a sample; files without extension are not.
    for key, group in groupby((k for k in keyed if k[1]), key=lambda k: k[0]):
        entries = [(extension, file) for _, extension, file in group]
        sample = dict(entries)
        if key in seen or len(sample) < len(entries):
            raise DataError(f"shard {shard} has sample {key} twice; write it again with one each")
        seen.add(key)
        images = [sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample]
        if len(images) != 1 or "cls" not in sample:
            raise DataError(
                f"sample {key} in {shard} has the files {', '.join(sample)}; give it one image "
                f"({', '.join(IMAGE_EXTENSIONS)}) and one label (cls)"
            )
        yield images[0], _label(sample["cls"])
    if not seen:
        raise DataError(f"shard {shard} has no samples; remove it, or write it again")


def _key_and_extension(name: str) -> tuple[str, str]:
    """A path up to the first dot of its file name, and the rest in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _label(file: Member) -> int:
    text = file.read() if file.size <= LABEL_BYTES else b"a long text"
    if not LABEL.fullmatch(text):
        shown = text.decode("ascii", "replace").strip()
        raise DataError(
            f"label {file} is {shown!r}; write a class number there, a whole number from 0 of at "
            "most six digits"
        )
    return int(text)


def _class_names(info: _Info, samples: list[Sample]) -> list[str]:
    image, highest = max(samples, key=lambda sample: sample[1])
    names = info.class_names or info.classes or [str(label) for label in range(highest + 1)]
    if highest >= len(names):
        raise DataError(
            f"the label of {image} is {highest}, but {INFO_FILES[0]} has {len(names)} class "
            "names, counted from 0; correct one of them"
        )
    return names


def _images(samples: list[Sample]) -> ImagesInTars:
    return ImagesInTars([member for member, _ in samples], [label for _, label in samples])
