"""One small data set in every form that --data takes, for the tests of those forms."""

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from webdataset import ShardWriter

from ricciq.data.dataset import ImageData
from ricciq.data.open import open_data
from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import DataError

TINY = Preprocessing((3, 16, 16), (0.5,) * 3, (0.25,) * 3)
CLASSES = ("cat", "dog")
COUNTS = {"train": 8, "val": 2}


def png(value: int) -> bytes:
    """An image of 20 x 16 pixels in a lossless format, another one for each value."""
    pixels = np.random.default_rng(value).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def samples(split: str) -> Iterable[tuple[int, str, bytes]]:
    """Target, file name and content of every image, in the order of the folder form."""
    for target in range(len(CLASSES)):
        for i in range(COUNTS[split]):
            yield target, f"{i}.png", png(1000 * (split == "val") + 100 * target + i)


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields) -> None:
    """Put a file into a tar; fields change what its header says."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for field, value in fields.items():
        setattr(entry, field, value)
    tar.addfile(entry, io.BytesIO(content))


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """A tar with these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            add(tar, name, content)
    return path


def as_folder(root: Path) -> tuple[str, None]:
    """train/cat/0.png and so on."""
    for split in COUNTS:
        for target, name, content in samples(split):
            path = root / split / CLASSES[target] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return str(root), None


def as_tar(root: Path) -> tuple[str, None]:
    """train.tar with cat/0.png in it."""
    for split in COUNTS:
        files = [(f"./{split}/{CLASSES[t]}/{name}", content) for t, name, content in samples(split)]
        write_tar(root / f"{split}.tar", reversed(files))
    return str(root), None


def as_class_tars(root: Path) -> tuple[str, None]:
    """train/cat.tar with 0.png in it."""
    for split in COUNTS:
        for target, class_name in enumerate(CLASSES):
            files = [(name, content) for t, name, content in samples(split) if t == target]
            write_tar(root / split / f"{class_name}.tar", files)
    return str(root), None


def as_tar_of_tars(root: Path) -> tuple[str, None]:
    """train.tar with cat.tar in it, and 0.png in that."""
    as_class_tars(root / "inner")
    for split in COUNTS:
        inner = sorted((root / "inner" / split).iterdir())
        write_tar(root / f"{split}.tar", [(path.name, path.read_bytes()) for path in inner])
    return str(root), None


def as_shards(root: Path) -> tuple[str, Path]:
    """Shards of five samples, written by webdataset itself."""
    root.mkdir(exist_ok=True)
    for split in COUNTS:
        with ShardWriter(f"{root}/pets-{split}-%04d.tar", maxcount=5, verbose=0) as writer:
            for target, name, content in samples(split):
                key = f"{CLASSES[target]}/{Path(name).stem}"
                writer.write({"__key__": key, "png": content, "cls": target, "json": {"a": 1}})
    return "wds/pets", root


def as_parquet(root: Path) -> tuple[str, Path]:
    """A folder of parquet files, written by datasets itself."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    for split in COUNTS:
        found = list(samples(split))
        columns = {
            "image": [{"bytes": content, "path": None} for _, _, content in found],
            "label": [target for target, _, _ in found],
        }
        data = datasets.Dataset.from_dict(columns, features)
        (root / "pets").mkdir(exist_ok=True, parents=True)
        data.to_parquet(root / "pets" / f"{split}.parquet")
    return f"hfds/{root / 'pets'}", root / "cache"


def as_image_folder(root: Path) -> tuple[str, Path]:
    """Class folders, read by datasets."""
    as_folder(root / "pets")
    return f"hfds/{root / 'pets'}", root / "cache"


def as_torch_folder(root: Path) -> tuple[str, Path]:
    """Class folders, read by torchvision."""
    as_folder(root)
    (root / "val").rename(root / "validation")
    return "torch/image_folder", root


FORMS: dict[str, Callable[[Path], tuple[str, Path | None]]] = {
    "folder": as_folder,
    "tar": as_tar,
    "class tars": as_class_tars,
    "tar of tars": as_tar_of_tars,
    "shards": as_shards,
    "parquet": as_parquet,
    "image folder": as_image_folder,
    "torch folder": as_torch_folder,
}


def batches(data: ImageData, split="fit", preprocessing=TINY, **options):
    """A loader with defaults for tests."""
    defaults = {"batch_size": 4, "workers": 0, "training": False}
    return data.loader(split, preprocessing, **(defaults | options))


def drain(loader) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and targets of a loader."""
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def everything(name: str, root: Path | None, **options) -> dict[str, tuple]:
    """Images and targets of every split."""
    data = open_data(name, root)
    return {split: drain(batches(data, split, **options)) for split in ("fit", "holdout", "val")}


def refusal(name: str, root: Path | None, *words: str) -> str:
    """The message of the DataError from a data set: one sentence with these words."""
    try:
        everything(name, root)
    except DataError as error:
        message = str(error)
    else:
        raise AssertionError(f"{name} was read")
    assert "\n" not in message
    assert "Traceback" not in message
    assert "; " in message  # what is wrong; what to do
    for word in words:
        assert word in message, message
    return message
