"""Batches travel as bytes, and end as the numbers that timm's transforms give, to the bit."""

import random

import numpy as np
import pytest
import torch
from forms import as_folder, batches, drain
from PIL import Image
from timm.data import create_transform
from timm.data.mixup import Mixup, one_hot
from torchvision import transforms

from ricciq.data.augmentation import Augmentation
from ricciq.data.loader import set_epoch
from ricciq.data.normalizing import ALIGNMENT, PIECE, Bytes, Normalizing
from ricciq.data.open import open_data
from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import RicciqError

CPU = torch.device("cpu")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOUR = Preprocessing((3, 24, 16), *IMAGENET, crop_pct=0.9)
GREY = Preprocessing((1, 8, 8), (0.3,), (0.7,))
ERASING = Augmentation(no_aug=False, auto_augment="rand-m7-mstd0.5", reprob=0.5)
PADDED = Augmentation(no_aug=False, pad_crop=2, color_jitter=0.4)
EVERYTHING = Augmentation(no_aug=False, reprob=0.5, mixup=0.8, cutmix=1.0)


def timms_transform(augmentation, preprocessing):
    """timm's transform from an image to normalized numbers, with random erasing."""
    common = {
        "input_size": preprocessing.input_size,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": preprocessing.interpolation,
    }
    if augmentation is None:
        return create_transform(**common, crop_pct=preprocessing.crop_pct)
    height, width = size = preprocessing.input_size[1:]
    whole = (1.0, 1.0), (width / height,) * 2
    padded = augmentation.pad_crop
    scale, ratio = whole if padded else (augmentation.scale, augmentation.ratio)
    vary = create_transform(
        **common,
        is_training=True,
        scale=scale,
        ratio=ratio,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter or None,
        auto_augment=augmentation.auto_augment,
        re_prob=augmentation.reprob,
    )
    first = [transforms.Resize(size), transforms.RandomCrop(size, padding=padded)]
    return transforms.Compose([*(first if padded else []), vary])


def timms_batches(loader, augmentation, preprocessing, seed, epoch, classes):
    """The expected batches, made image by image with timm's transform on numbers."""
    samples, transform = loader.dataset, timms_transform(augmentation, preprocessing)
    for positions in loader.batch_sampler:
        chosen = samples.indices[np.array(positions) % len(samples)]
        images = []
        for index in chosen:
            random.seed(f"augmentation {seed} {epoch} {index}")
            np.random.seed(random.getrandbits(32))
            torch.manual_seed(random.getrandbits(63))
            images.append(transform(samples.images.open(int(index), preprocessing.mode)))
        inputs, targets = torch.stack(images), torch.from_numpy(samples.images.targets[chosen])
        if augmentation is not None and augmentation.mixup:
            random.seed(f"mixing {seed} {epoch} {chosen.tolist()}")
            np.random.seed(random.getrandbits(32))
            mix = Mixup(augmentation.mixup, augmentation.cutmix, label_smoothing=0)
            mix.num_classes = classes
            even, shares = len(targets) // 2 * 2, one_hot(targets, classes)
            inputs[:even], shares[:even] = mix(inputs[:even], targets[:even])
            targets = shares
        yield inputs, targets


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmentation", [None, ERASING, PADDED, EVERYTHING])
@pytest.mark.parametrize("preprocessing", [COLOUR, GREY], ids=["colour", "grey"])
def test_batches_are_those_of_timm(tmp_path, preprocessing, augmentation, workers):
    data = open_data(*as_folder(tmp_path))
    options = {"batch_size": 5, "training": True, "augmentation": augmentation, "seed": 3}
    loader = batches(data, "fit", preprocessing, workers=workers, **options)
    set_epoch(loader, 2)
    with torch.random.fork_rng(devices=[]):
        expected = timms_batches(loader, augmentation, preprocessing, 3, 2, data.num_classes)
        images, targets = (torch.cat(parts) for parts in zip(*expected, strict=True))
    found, answers = drain(loader)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found, images)
    assert torch.equal(answers, targets)
    assert loader.dataset.__getitems__([0, 1]).pixels.dtype == torch.uint8


@pytest.mark.parametrize(
    ("mean", "std"), [IMAGENET, ((0.5, 0.0, 1.0), (0.5, 1.0, 255.0)), ((1 / 3,) * 3, (1e-3,) * 3)]
)
def test_every_byte_becomes_the_same_number(mean, std):
    whole = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(torch.tensor(mean), torch.tensor(std))]
    )
    values = np.arange(256, dtype=np.uint8)
    side = int((PIECE // 3) ** 0.5)  # an image is about a piece
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    pixels[0, 0, :256] = values[:, None]
    expected = torch.stack([whole(Image.fromarray(image)) for image in pixels])
    batch = Bytes(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.zeros(3, dtype=torch.int64))
    images, _ = Normalizing(Preprocessing((3, side, side), mean, std), None, CPU)(batch)
    assert torch.equal(images, expected)
    assert images.data_ptr() % ALIGNMENT == 0


def test_a_gpu_that_is_full_is_an_error_of_one_sentence(tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    loader = batches(open_data(*as_folder(tmp_path)))
    monkeypatch.setattr(Normalizing, "__call__", fail)
    with pytest.raises(RicciqError, match="another batch of 4 images; lower --batch-size"):
        drain(loader)
