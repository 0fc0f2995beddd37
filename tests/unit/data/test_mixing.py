"""Mixup and CutMix: soft targets that depend only on seed, epoch and batch."""

import random

import numpy as np
import pytest
import torch
from forms import as_folder, batches, drain
from torch.nn import functional as F

from ricciq.data.augmentation import Augmentation
from ricciq.data.loader import set_epoch
from ricciq.data.open import open_data
from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import RecipeError
from ricciq.recipe import Recipe, TrainingSection
from ricciq.training.losses import loss_function
from ricciq.training.metrics import Tally

MIXUP = Augmentation(mixup=0.8)
CUTMIX = Augmentation(cutmix=1.0)
BOTH = Augmentation(mixup=0.8, cutmix=1.0)
GREY = Preprocessing((1, 8, 8), (0.0,), (1.0,))


@pytest.fixture(scope="module")
def digits():
    return open_data("digits", None)


@pytest.fixture
def data(tmp_path):
    return open_data(*as_folder(tmp_path))


def seen(data, augmentation, epoch=0, preprocessing=GREY, **options):
    loader = batches(
        data, "fit", preprocessing, training=True, augmentation=augmentation, **options
    )
    set_epoch(loader, epoch)
    return drain(loader)


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX, BOTH])
def test_targets_are_shares_of_two_classes(digits, mixing):
    images, shares = seen(digits, mixing, batch_size=64)
    assert images.dtype == shares.dtype == torch.float32
    assert shares.shape == (len(images), 10)
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
    counts = (shares > 0).sum(1)
    assert set(counts.tolist()) == {1, 2}
    plain, targets = seen(digits, None, batch_size=64)
    assert targets.dtype == torch.int64
    assert not torch.equal(images, plain)


def test_a_mixed_image_is_the_sum_that_its_shares_say(digits):
    plain, targets = seen(digits, None, batch_size=1365)
    images, shares = seen(digits, MIXUP, batch_size=1365)
    other = plain[:1364].flip(0)
    lam = next(shares[i, targets[i]] for i in range(1364) if targets[i] != targets[1363 - i])
    torch.testing.assert_close(images[:1364], plain[:1364] * lam + other * (1 - lam))
    # An odd batch: the last image is as it was.
    assert torch.equal(images[1364], plain[1364])
    assert torch.equal(shares[1364], F.one_hot(targets[1364], 10).float())


@pytest.mark.parametrize("batch_size", [1, 3, 64, 2000])
def test_every_size_of_batch_is_mixed_or_left(digits, batch_size):
    images, shares = seen(digits, BOTH, batch_size=batch_size, train_samples=130)
    plain, _ = seen(digits, None, batch_size=batch_size, train_samples=130)
    assert shares.shape == (len(plain), 10)
    assert torch.equal(images, plain) is (batch_size == 1)


@pytest.mark.parametrize("augmentation", [BOTH, Augmentation(no_aug=False, mixup=0.5, reprob=0.5)])
def test_mixing_depends_on_seed_and_epoch_alone(data, augmentation):
    def found(**options):
        preprocessing = Preprocessing((3, 16, 16), (0.5,) * 3, (0.25,) * 3)
        return seen(data, augmentation, preprocessing=preprocessing, batch_size=3, **options)

    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    first = found(seed=1, epoch=2)
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.random.get_rng_state(), state[2])
    for workers in (0, 2):
        again = found(seed=1, epoch=2, workers=workers)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
    for changed in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not torch.equal(found(**changed)[1], first[1])


def test_an_epoch_entered_in_the_middle_is_mixed_the_same(digits):
    loader = batches(digits, "fit", GREY, training=True, augmentation=BOTH, batch_size=100)
    set_epoch(loader, 2)
    whole = drain(loader)
    set_epoch(loader, 2, skip_batches=4)
    rest = drain(loader)
    assert torch.equal(rest[0], whole[0][400:])
    assert torch.equal(rest[1], whole[1][400:])


@pytest.mark.parametrize(
    ("augmentation", "mixed"),
    [
        (MIXUP, True),  # eight pixels, for which nothing else is on by default
        (Augmentation(), False),
        (Augmentation(no_aug=True, mixup=1.0), False),
        (Augmentation(no_aug=False, cutmix=1.0), True),
        (Augmentation(mixup=1.0, mixup_prob=0.0), None),  # never mixed, but might be
    ],
)
def test_when_batches_are_mixed(digits, augmentation, mixed):
    _, targets = seen(digits, augmentation, batch_size=64)
    assert (targets.ndim == 2) is (mixed is not False)
    if mixed is None:
        assert ((targets == 0) | (targets == 1)).all()


def test_evaluation_is_never_mixed(digits):
    _, targets = drain(batches(digits, "val", GREY, augmentation=BOTH))
    assert targets.dtype == torch.int64


# What training does with the shares


def test_the_loss_of_shares_is_the_mean_of_the_losses():
    logits, teacher = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    one, other = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 2, 1, 0, 0, 1])
    shares = 0.3 * F.one_hot(one, 4) + 0.7 * F.one_hot(other, 4)
    for settings in (
        TrainingSection(distill=0.0),
        TrainingSection(distill=0.0, label_smoothing=0.1),
        TrainingSection(distill=0.4, temperature=2.0),
    ):
        found, first, second = (
            loss_function(logits, targets, teacher if settings.distill else None, settings)
            for targets in (shares, one, other)
        )
        torch.testing.assert_close(found, 0.3 * first + 0.7 * second)


def test_accuracy_counts_the_larger_share():
    tally = Tally()
    shares = torch.tensor([[0.7, 0.3], [0.4, 0.6], [1.0, 0.0]])
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    tally.add(torch.tensor(1.0), logits, shares)
    assert tally.means == (1.0, pytest.approx(200 / 3))
    assert tally.images == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mixup", -0.1),
        ("cutmix", -1),
        ("mixup_prob", 1.1),
        ("mixup_switch_prob", -1),
        ("mixup", "x"),
    ],
)
def test_invalid_values_are_refused(key, value):
    with pytest.raises(RecipeError, match=f"augmentation.{key}"):
        Recipe().override({f"data.augmentation.{key}": value})


def test_flags_reach_the_recipe():
    flags = {"mixup": 0.2, "cutmix": 1.0, "reprob": 0.1, "auto_augment": "rand-m7"}
    merged = Recipe().override({f"data.augmentation.{key}": v for key, v in flags.items()})
    found = merged.data.augmentation
    assert {key: getattr(found, key) for key in flags} == flags
    assert Recipe.from_values({"data": {"augmentation": flags}}).data.augmentation == found
