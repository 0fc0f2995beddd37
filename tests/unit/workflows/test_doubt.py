"""A warning where classes are in another order, and none where a network is only weak."""

from __future__ import annotations

import numpy as np
import pytest

from ricciq.workflows.doubt import Classes, doubt

RANDOM = np.random.default_rng(0)


def labels(classes: int, each: int) -> Classes:
    return np.repeat(np.arange(classes), each)


def weakened(targets: Classes, classes: int, share: float) -> Classes:
    """Predictions of which about this share is right."""
    guess = RANDOM.integers(0, classes, len(targets))
    return np.where(RANDOM.random(len(targets)) < share, targets, guess)


def text_order(classes: int) -> Classes:
    """The number that folders 0, 1, 2 and so on have where they are sorted as text."""
    in_text = sorted(map(str, range(classes)))
    return np.array([in_text.index(str(number)) for number in range(classes)])


@pytest.mark.parametrize("classes", [12, 20, 100])
@pytest.mark.parametrize("share", [0.99, 0.7])
def test_folders_in_the_order_of_text(classes: int, share: float) -> None:
    targets = labels(classes, 20)
    predicted = text_order(classes)[weakened(targets, classes, share)]
    said = doubt(predicted, targets, classes, "the float model")
    assert said is not None
    assert "in another order" in said
    assert "--class-map" in said


@pytest.mark.parametrize("outputs", [5, 1000])
def test_guessing(outputs: int) -> None:
    targets = labels(5, 40)
    said = doubt(RANDOM.integers(0, outputs, 200), targets, outputs, "the float model")
    assert said is not None
    assert "no better than guessing" in said
    constant = doubt(np.full(200, 3), targets, 5, "the float model")
    assert constant is not None
    assert "20.00 %" in constant


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.3])
def test_a_weak_network_is_not_doubted(classes: int, share: float) -> None:
    targets = labels(classes, 4000 // classes)
    assert doubt(weakened(targets, classes, share), targets, classes, "the float model") is None


def test_two_classes_that_are_confused_are_no_other_order() -> None:
    targets = labels(100, 10)
    predicted = targets.copy()
    predicted[:20] = 1 - predicted[:20]
    predicted = np.where(RANDOM.random(1000) < 0.1, 7, predicted)
    assert doubt(predicted, targets, 100, "the float model") is None


def test_classes_that_the_data_lack_are_no_other_order() -> None:
    targets = labels(20, 6)
    predicted = np.where(targets < 3, targets + 20, targets)  # their siblings
    assert doubt(predicted, targets, 100, "the float model") is None


def test_too_few_images_tell_nothing() -> None:
    assert doubt(np.array([1, 0]), np.array([0, 1]), 2, "the float model") is None


def test_images_of_one_class_can_all_be_right() -> None:
    assert doubt(np.full(50, 7), np.full(50, 7), 10, "the float model") is None
