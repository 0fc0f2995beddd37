"""`ricciq recipes keys`: every key of a recipe is described, and its type is in words."""

import json

import pytest
import recipes_page
from command import ricciq

from ricciq.cli.keys import recipe_keys
from ricciq.recipe import Recipe


def flat(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict) and value:  # model.kwargs is an empty one
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


ROWS = {row["key"]: row for row in recipe_keys()}


def test_every_key_of_a_recipe_is_there():
    assert sorted(ROWS) == sorted(flat(Recipe().model_dump(mode="json")))


@pytest.mark.parametrize("key", ROWS)
def test_a_key_has_a_description_a_type_and_its_default(key):
    row = ROWS[key]
    assert len(row["description"]) > 10
    assert row["description"].endswith(".")
    assert row["type"]
    value = Recipe().model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    assert row["default"] == value


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("data.batch_size", "integer >= 1 | auto"),
        ("data.holdout", "number > 0, <= 0.5"),
        ("data.augmentation.scale", "2 of number > 0, <= 1"),
        ("quantization.act_quantizer", "lsq | pact | fixed"),
        ("quantization.max_bytes", "size, such as 4MB"),
        ("training.progressive", "list of integer 2 to 8"),
        ("model.checkpoint", "path"),
        ("seed", "integer >= 0"),
    ],
)
def test_types_are_in_words(key, kind):
    assert ROWS[key]["type"] == kind


def test_the_verb_shows_a_section():
    answer = ricciq("recipes", "keys", "data.augmentation", "--json")
    rows = json.loads(answer.out)["keys"]
    assert {row["key"].rpartition(".")[0] for row in rows} == {"data.augmentation"}
    assert "training.lr" in ricciq("recipes", "keys").out


def test_an_unknown_section_is_one_sentence():
    answer = ricciq("recipes", "keys", "trainin")
    assert answer.code == 2
    assert "no section trainin; did you mean training" in answer.err


def test_the_page_of_recipes_is_made_of_them():
    assert recipes_page.FILE.read_text(encoding="utf-8") == recipes_page.page(), (
        "run python tests/support/recipes_page.py"
    )
