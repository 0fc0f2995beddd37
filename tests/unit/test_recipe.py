"""Recipes: precedence of values, errors, and where the shipped recipes are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml

import ricciq.models.factory  # noqa: F401  registers the bundled nets with timm
from ricciq.errors import RecipeError
from ricciq.recipe import MAX_BYTES, Recipe, find_recipe, shipped_recipes

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def refusal(values) -> str:
    """The error message about invalid values: one sentence."""
    with pytest.raises(RecipeError) as caught:
        Recipe.from_values(values)
    assert caught.value.exit_code == 2
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(recipe_file):
    recipe = Recipe.load(recipe_file("training: {epochs: 3, lr: 0.5}\nseed: 4\n"))
    merged = recipe.override({"training.lr": 0.25, "seed": None, "training.epochs": None})
    defaults = Recipe()
    assert (merged.training.lr, merged.training.epochs, merged.seed) == (0.25, 3, 4)
    assert merged.training.opt == defaults.training.opt
    assert merged.data == defaults.data
    assert recipe.training.lr == 0.5  # the recipe itself is left as it was


def test_a_flag_that_is_zero_or_false_or_deep_counts():
    flags = {"training.distill": 0.0, "amp": False, "data.augmentation.hflip": 0.0}
    merged = Recipe().override(flags)
    assert (merged.training.distill, merged.amp, merged.data.augmentation.hflip) == (0.0, False, 0)


def test_flags_are_checked_too():
    with pytest.raises(RecipeError, match=r"command line .* quantization\.weight_bits = 9"):
        Recipe().override({"quantization.weight_bits": 9})
    with pytest.raises(RecipeError, match="unknown key trainin; did you mean training"):
        Recipe().override({"trainin.lr": 1.0})


def test_the_yaml_of_a_recipe_is_that_recipe(recipe_file):
    recipe = Recipe().override(
        {
            "model.name": "resnet18.a1_in1k",
            "model.checkpoint": Path("weights/füße.safetensors"),
            "data.augmentation": {"scale": (0.1, 0.3), "auto_augment": "rand-m7-mstd0.5"},
            "quantization.weight_bits": "ternary",
            "method.block": 9,
            "method.time": 1e-17,
            "training.lr": 1e-5,
            "seed": 2**63 - 1,
            "amp": True,
        }
    )
    assert Recipe.load(recipe_file(recipe.to_yaml())) == recipe
    assert set(yaml.safe_load(recipe.to_yaml())) == set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("values", "key", "hint"),
    [
        ({"trainin": {}}, "trainin", "training"),
        ({"training": {"epoch": 3}}, "training.epoch", "training.epochs"),
        (
            {"quantization": {"weight_bit": 3}},
            "quantization.weight_bit",
            "quantization.weight_bits",
        ),
        (
            {"data": {"augmentation": {"hflp": 0.1}}},
            "data.augmentation.hflp",
            "data.augmentation.hflip",
        ),
        ({"input_size": 32}, "input_size", "data.input_size"),
        ({"model": {"input_size": 32}}, "model.input_size", "data.input_size"),
        ({"data": {"nam": "digits"}}, "data.nam", "data.name"),
        ({"nam": "resnet18"}, "nam", "model.name, data.name or method.name"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(values, key, hint):
    assert refusal(values) == f"the recipe has an unknown key {key}; did you mean {hint}"


def test_a_key_unlike_any_other_is_to_be_removed():
    assert refusal({"zzzz": 1}).endswith("unknown key zzzz; remove it")


@pytest.mark.parametrize(
    ("values", "key", "value"),
    [
        ({"quantization": {"weight_bits": 9}}, "quantization.weight_bits", "9"),
        ({"quantization": {"act_bits": "ternary"}}, "quantization.act_bits", "ternary"),
        ({"quantization": 4}, "quantization", "4"),
        ({"training": {"epochs": 2.5}}, "training.epochs", "2.5"),
        ({"training": {"epochs": -1}}, "training.epochs", "-1"),
        ({"training": {"lr": "fast"}}, "training.lr", "fast"),
        ({"training": {"lr": float("inf")}}, "training.lr", "inf"),
        ({"training": {"lr": float("nan")}}, "training.lr", "nan"),
        ({"training": {"distill": 1.5}}, "training.distill", "1.5"),
        ({"method": {"name": "rici"}}, "method.name", "rici"),
        ({"method": {"block": 0}}, "method.block", "0"),
        ({"method": {"block": "rows"}}, "method.block", "rows"),
        ({"method": {"strength": float("nan")}}, "method.strength", "nan"),
        ({"model": {"name": None}}, "model.name", "None"),
        ({"data": {"batch_size": 0}}, "data.batch_size", "0"),
        ({"seed": -1}, "seed", "-1"),
        ({"seed": 2**63}, "seed", str(2**63)),
        ({"device": "tpu\n"}, "device", "tpu"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(values, key, value):
    assert refusal(values).startswith(f"the recipe is invalid at {key} = {value}: ")


def test_a_warmup_that_leaves_no_epoch_is_refused():
    sentence = refusal({"training": {"epochs": 3, "warmup_epochs": 3}})
    assert "warmup_epochs 3 must be less than epochs 3" in sentence


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just words",
        "- a\n- list\n",
        "a: b: c",
        "[" * 5000,
        "seed: 2024-99-99",
        "seed: 0x_",
        "a: !!timestamp x",
        "a: !!int ''",
        "a: !!float _",
        "a: 1:1:1" + ":1" * 300 + ":1.5",
        "--- 1\n--- 2\n",
        b"\x89PNG\r\n\x1a\n\xff\xfe\x00",
        b"PK\x03\x04" + bytes(range(256)),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(recipe_file, text):
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        Recipe.load(recipe_file(text))


def test_a_large_file_is_not_read(recipe_file):
    with pytest.raises(RecipeError, match="larger than 1 MB"):
        Recipe.load(recipe_file("# " + "x" * MAX_BYTES))


@pytest.mark.parametrize("item", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_of_aliases_do_not_fill_the_memory(recipe_file, item):
    lines = ["model: &a0 {x: 1}"]
    lines += [f"b{i}: &a{i} {item.format(','.join([f'*a{i - 1}'] * 9))}" for i in range(1, 12)]
    with pytest.raises(RecipeError, match="alias"):
        Recipe.load(recipe_file("\n".join(lines)))


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os"]
)
def test_python_tags_do_not_run(recipe_file, tmp_path, tag):
    target = tmp_path / "made"
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(recipe_file(f"model: {tag} ['{target}']\n"))
    assert not target.exists()


def test_a_missing_recipe_suggests_names():
    with pytest.raises(RecipeError, match="did you mean digits-float"):
        find_recipe("digit-float")
    with pytest.raises(
        RecipeError, match=r"no recipe qqqq; there are convnext_tiny-w2a2, .*fashion-low"
    ):
        find_recipe("qqqq")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe"):
        Recipe.load(tmp_path)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_loads_and_names_a_known_model(name):
    recipe = Recipe.load(name)
    assert timm.is_model(recipe.model.name)
    assert recipe.data.name or "ImageNet" in find_recipe(name).read_text()
    assert recipe == Recipe.load(ROOT / "recipes" / f"{name}.yaml")


CODE = "from ricciq.recipe import *; print(recipe_folder()); print(*shipped_recipes())"


def recipes_seen_from(package_parent: Path) -> list[str]:
    """The recipe folder and the recipe names that a package at a path finds."""
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "PYTHONPATH": str(package_parent)},
        cwd=package_parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_recipes_are_found_in_a_clone():
    folder, names = recipes_seen_from(ROOT)
    assert Path(folder) == ROOT / "recipes"
    assert "digits-float" in names.split()


def test_recipes_are_found_inside_a_wheel(tmp_path):
    shutil.copytree(ROOT / "ricciq", tmp_path / "ricciq")
    shutil.copytree(ROOT / "recipes", tmp_path / "ricciq" / "recipes")
    folder, names = recipes_seen_from(tmp_path)
    assert Path(folder) == tmp_path / "ricciq" / "recipes"
    assert names.split() == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("width", [{"weight_bits": 3}, {"weight_bits": 2, "edge_bits": 6}])
def test_a_codebook_has_no_form_of_several_planes(width):
    sentence = refusal({"quantization": {"weight_quantizer": "codebook", **width}})
    assert "weight_quantizer codebook does not support a width of" in sentence
    assert "give 1, 2, 4, 8 or ternary" in sentence


# The method's target, which was called `on`


@pytest.mark.parametrize(
    "text", ["target: weights", "on: weights", "'on': weights", "on: null\n  target: weights"]
)
def test_a_target_is_read_under_its_old_name_too(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"method:\n  {text}\n")
    recipe = Recipe.load(file)
    assert recipe.method.corrects == "weights"
    assert recipe == Recipe().override({"method.target": "weights"})
    saved = yaml.safe_load(recipe.to_yaml())["method"]
    assert saved["target"] == "weights"
    assert "on" not in saved
    assert True not in saved


@pytest.mark.parametrize("name", ["on", "'on'"])
def test_two_targets_are_refused(tmp_path, name):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"method:\n  target: weights\n  {name}: both\n")
    with pytest.raises(RecipeError, match=r"its old name, differ \(weights and both\)") as refused:
        Recipe.load(file)
    assert "\n" not in str(refused.value)
    file.write_text(f"method:\n  target: both\n  {name}: both\n")
    assert Recipe.load(file).method.corrects == "both"


def test_a_key_of_number_one_is_no_target():
    with pytest.raises(RecipeError, match=r"method\.1"):
        Recipe.from_values({"method": {1: "weights"}})


def test_an_override_by_the_old_name_replaces_the_target():
    recipe = Recipe().override({"method.target": "weights"})
    assert recipe.override({"method.on": "both"}).method.target == "both"
    with pytest.raises(RecipeError, match="differ"):
        recipe.override({"method.on": "both", "method.target": "weights"})


def test_the_recipe_of_a_run_of_version_0_1_0_is_the_same_recipe(tmp_path):
    keys = "coordinate block flow correction time rho tau_max schedule strength delta alpha"
    method = dict.fromkeys([*keys.split(), "max_codes", "trust", "on"])
    values = Recipe().model_dump(mode="json") | {"method": {"name": "ricci", **method}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    assert "'on': null" in file.read_text()
    assert Recipe.load(file) == Recipe()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("seed: 010", "seed", 10),  # 8 in YAML 1.1
        ("data: {name: 2020-01-01}", "data.name", "2020-01-01"),
        ("data: {name: 2020}", "data.name", "2020"),
        ('quantization: {weight_bits: "2", act_bits: "8"}', "quantization.weight_bits", 2),
        ("training:\n  # lr: 0.1\nseed: 1", "seed", 1),
        ("\ufefftraining:\r\n  lr: 1e-4\r\n", "training.lr", 1e-4),
        ("compile: off", "compile", False),
    ],
)
def test_yaml_is_read_as_people_mean_it(recipe_file, text, key, value):
    changed = Recipe().differences(Recipe.load(recipe_file(text)))
    assert changed[key][1] == value


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("training.lr: 0.1", r"write lr in the section training, as in training: \{lr: …\}"),
        ("training: {epochs: 1:30}", "epochs = 1:30"),
        ("model: {name: [resnet18]}", "should be a valid string"),
    ],
)
def test_yaml_that_means_something_else_is_refused(recipe_file, text, hint):
    with pytest.raises(RecipeError, match=hint):
        Recipe.load(recipe_file(text))


def test_differences_are_by_dotted_key():
    other = Recipe().override(
        {"training.lr": 1e-4, "model.kwargs": {"depth": 3}, "data.workers": 2}
    )
    assert Recipe().differences(other) == {
        "training.lr": (2e-3, 1e-4),
        "model.kwargs.depth": (None, 3),
    }
    assert Recipe().gives_the_run_of(Recipe().override({"data.workers": 2}))
