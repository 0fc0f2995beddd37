"""Batches on the device are those on a CPU, to the bit, whatever runs while they are made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import CPU, DEVICE, TINY
from PIL import Image

from ricciq.data.augmentation import Augmentation
from ricciq.data.loader import set_epoch
from ricciq.data.open import open_data
from ricciq.data.preprocessing import Preprocessing

SIZE = 32 if TINY else 224
COLOUR = Preprocessing((3, SIZE, SIZE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Preprocessing((1, 8, 8), (0.3,), (0.7,))
AUGMENTATIONS = {
    "plain": Augmentation(no_aug=True),
    "varied": Augmentation(no_aug=False),
    "erased": Augmentation(no_aug=False, reprob=0.5),
    "mixed": Augmentation(no_aug=False, reprob=0.5, mixup=0.8, cutmix=1.0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 120), ("val", 8)):
        for number in range(count):
            path = root / split / f"class{number % 4}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 256, (SIZE, SIZE + 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path, compress_level=0)
    return root


def loader_on(device, name, preprocessing, augmentation, workers):
    loader = open_data(str(name)).loader(
        "fit",
        preprocessing,
        batch_size=8,
        workers=workers,
        training=True,
        augmentation=augmentation,
        device=device,
    )
    set_epoch(loader, 1)
    return loader


def consumed(loader, busy):
    """Copies of all batches, made on the device after work that takes longer than loading."""
    copies = []
    for images, targets in loader:
        assert images.device.type == targets.device.type == DEVICE.type
        for _ in range(0 if TINY else 20):
            busy = (busy @ busy).clamp(-1, 1)
        copies.append((images.clone(), targets.clone()))
        images.fill_(7)  # as a step that works in place
        del images, targets  # their memory may be used again, but not before it is copied
    return [(images.cpu(), targets.cpu()) for images, targets in copies]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_a_folder(folder, augmentation, workers):
    expected = list(loader_on(CPU, folder, COLOUR, augmentation, 0))
    loader = loader_on(DEVICE, folder, COLOUR, augmentation, workers)
    found = consumed(loader, torch.ones(64 if TINY else 4096, 64 if TINY else 4096, device=DEVICE))
    assert len(found) == len(expected) > 10
    for (images, targets), (same_images, same_targets) in zip(found, expected, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(targets, same_targets)


def test_images_in_memory():
    pairs = zip(
        loader_on(DEVICE, "digits", GREY, None, 0),
        loader_on(CPU, "digits", GREY, None, 0),
        strict=True,
    )
    assert all(torch.equal(images.cpu(), same) for (images, _), (same, _) in pairs)


def test_the_host_never_waits(folder):
    if DEVICE.type != "cuda":
        pytest.skip("needs a GPU, which tells when the host waits for it")
    loader = loader_on(DEVICE, folder, COLOUR, AUGMENTATIONS["mixed"], 2)
    for _ in loader:  # memory is allocated
        pass
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in loader:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
