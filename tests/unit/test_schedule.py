"""The rules by which a schedule follows from the network and the data."""

from itertools import product

import pytest

from ricciq.models.kind import network_kind
from ricciq.recipe import Recipe
from ricciq.recipe.schedule import RULES, Task, derived

SIZES = (1, 500, 5_000, 50_000, 1_281_167, 100_000_000)


def test_every_rule_sets_a_key_of_its_own_with_a_reason() -> None:
    assert len({rule.key for rule in RULES}) == len(RULES)
    assert all(rule.reason.endswith(".") for rule in RULES)


@pytest.mark.parametrize("network", ["batchnorm", "depthwise", "transformer"])
def test_every_schedule_is_a_valid_recipe(network) -> None:
    for images, side, bits in product(SIZES, (8, 224), (1, 4, 8, 32)):
        recipe = Recipe().override(derived(Task(images, network, side, bits)))
        assert 5 <= recipe.training.epochs <= 100
        assert 1e-4 <= recipe.training.lr <= 2e-3 or images < 500


def test_few_images_get_more_epochs_and_a_million_few() -> None:
    tasks = [Task(images, "batchnorm", 224, 4) for images in SIZES]
    epochs = [derived(task)["training.epochs"] for task in tasks]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[1] > 3 * epochs[4]
    assert derived(tasks[4]._replace(bits=8))["training.epochs"] < epochs[4]


def test_fifty_thousand_small_images_get_the_plain_defaults() -> None:
    plain = Recipe()
    assert plain.override(derived(Task(50_000, "batchnorm", 28, 2))) == plain


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet18", "batchnorm"),
        ("fashion_resnet8", "batchnorm"),
        ("mobilenetv2_100", "depthwise"),
        ("fashion_mobilenet", "depthwise"),
        ("regnetx_002", "batchnorm"),
        ("vit_tiny_patch16_224", "transformer"),
        ("convnext_tiny", "transformer"),
    ],
)
def test_networks_are_told_apart(name: str, kind: str) -> None:
    assert network_kind(name, {}) == kind
