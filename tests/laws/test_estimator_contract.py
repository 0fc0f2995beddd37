"""The contract of every estimator in the catalogue, and what is generated from its entry."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
import torch
from methods_table import README, with_methods
from torch import Tensor

from ricciq.cli import completion, options
from ricciq.errors import RecipeError
from ricciq.estimators.base import Estimator, Perturbing
from ricciq.estimators.catalog import CATALOG, DEFAULT, Coordinate, Settings, all_settings
from ricciq.estimators.registry import METHODS, named_estimator
from ricciq.quant.fake_quantize import SLOPE_SAMPLES
from ricciq.recipe import MethodSection, Recipe

every = pytest.mark.parametrize("name", CATALOG)
ROWS, LENGTH = 5, 12


@pytest.fixture
def estimator(name: str) -> Estimator:
    return named_estimator(name, {})


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """A gradient, residuals, and a mask outside of which both are 0; the last row is all masked."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(ROWS, LENGTH, generator=generator) < 0.8
    mask[-1] = False
    gradient = torch.randn(ROWS, LENGTH, generator=generator) * mask
    residual = (2 * torch.rand(ROWS, LENGTH, generator=generator) - 1) * mask
    return gradient, residual, mask


# What an estimator does to gradients


@every
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_a_corrected_gradient_has_its_shape_and_dtype_is_finite_and_0_where_masked(
    estimator, drawn, progress
):
    gradient, residual, mask = drawn
    corrected = estimator.correct(gradient, residual, 3, mask, progress)
    assert (corrected.shape, corrected.dtype) == (gradient.shape, gradient.dtype)
    assert corrected.isfinite().all()
    assert not corrected[~mask].any()
    assert corrected[mask].any()


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_accepted(estimator, drawn, dtype):
    gradient, residual, mask = drawn
    corrected = estimator.correct(gradient.to(dtype), residual, 3, mask)
    assert corrected.dtype == dtype
    expected = estimator.correct(gradient, residual, 3, mask)
    torch.testing.assert_close(corrected.float(), expected, rtol=0.02, atol=0.02)


@every
def test_inputs_are_not_changed(estimator, drawn):
    before = [x.clone() for x in drawn]
    gradient, residual, mask = drawn
    estimator.correct(gradient, residual, 3, mask, 0.5)
    assert all(torch.equal(x, y) for x, y in zip(before, drawn, strict=True))


@every
def test_the_same_inputs_give_the_same_gradient(estimator, drawn):
    gradient, residual, mask = drawn
    first, again = (estimator.correct(gradient, residual, 3, mask, 0.5) for _ in range(2))
    assert torch.equal(first, again)


@every
def test_rows_do_not_affect_each_other(estimator, drawn):
    gradient, residual, mask = drawn
    whole = estimator.correct(gradient, residual, 3, mask)
    rows = [
        estimator.correct(*parts[:2], 3, parts[2])
        for parts in zip(*(torch.split(x, 1) for x in drawn), strict=True)
    ]
    torch.testing.assert_close(torch.cat(rows), whole)


@every
def test_a_gradient_of_0_stays_0(estimator, drawn):
    _, residual, mask = drawn
    assert not estimator.correct(torch.zeros(ROWS, LENGTH), residual, 3, mask).any()


@every
@pytest.mark.parametrize("codes", [2, 4, 16])
def test_a_slope_covers_the_grid_and_is_0_at_its_ends(estimator, codes):
    slope = estimator.slope(codes, SLOPE_SAMPLES, 0.5)
    if slope is not None:
        assert slope.shape == ((codes + 1) * SLOPE_SAMPLES + 1,)
        assert slope.isfinite().all()
        assert not slope[[0, -1]].any()
        assert torch.equal(slope, estimator.slope(codes, SLOPE_SAMPLES, 0.5))


@every
def test_values_that_are_rounded_instead_are_finite_and_follow_from_the_seed(estimator):
    if not isinstance(estimator, Perturbing):
        pytest.skip("it does not change the forward pass")
    ratio = torch.linspace(-3, 3, 50)
    before = ratio.clone()
    with torch.random.fork_rng():
        instead = [(torch.manual_seed(0), estimator.perturb(ratio, 1.0))[1] for _ in range(2)]
    assert torch.equal(*instead)
    assert instead[0].shape == ratio.shape
    assert (instead[0] - ratio).abs().max() <= 1  # at most to the next level
    assert torch.equal(ratio, before)


@every
def test_its_coordinate_is_known(estimator):
    assert estimator.coordinate in Coordinate.__args__


# Its entry


@every
def test_the_class_has_the_settings_of_the_entry(name):
    entry = CATALOG[name]
    made = entry.load()(**entry.defaults)
    assert issubclass(entry.settings, Settings)
    assert {field.name for field in fields(made)} == set(entry.settings.described())
    assert asdict(made) == entry.defaults
    assert METHODS[name] == named_estimator(name, {})


@every
def test_settings_survive_a_recipe_and_its_file(name, tmp_path):
    defaults = {key: one for key, one in CATALOG[name].defaults.items() if one is not None}
    recipe = Recipe.from_values({"method": {"name": name, **defaults}})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    again = Recipe.load(file)
    assert again == recipe
    assert again.method.changes == defaults
    assert named_estimator(name, again.method.changes) == METHODS[name]
    assert again.method.corrects == CATALOG[name].target


@every
def test_invalid_values_are_refused_in_one_sentence(name):
    for key, setting in CATALOG[name].settings.described().items():
        for bad in (math.nan, "nonsense"):
            with pytest.raises(
                RecipeError, match=f"^method {name} .*{key} is .*; give "
            ) as refused:
                named_estimator(name, {key: bad})
            assert setting.allowed in str(refused.value)
            assert "\n" not in str(refused.value)


@every
def test_settings_of_other_estimators_are_refused(name):
    for key in set(all_settings()) - set(CATALOG[name].defaults):
        with pytest.raises(RecipeError, match=f"method {name} has no {key}; remove it"):
            named_estimator(name, {key: 1})


@every
def test_an_estimator_can_be_copied_compared_and_pickled(estimator):
    assert replace(estimator) == estimator
    assert hash(replace(estimator)) == hash(estimator)
    assert pickle.loads(pickle.dumps(estimator)) == estimator


@every
def test_its_texts_fit_a_table(name):
    entry = CATALOG[name]
    assert entry.line
    texts = [entry.line, *(setting.description for setting in entry.settings.described().values())]
    assert all(text and "|" not in text and "\n" not in text for text in texts)


# What is generated from the entries


def test_the_recipe_has_the_names_and_settings_of_the_catalogue():
    assert MethodSection().name == DEFAULT == "ricci"
    assert set(MethodSection.model_fields) == {"name", "target", *all_settings()}
    assert all(field.description for field in MethodSection.model_fields.values())
    assert MethodSection().changes == {}


def test_help_and_completion_list_every_method():
    assert list(completion.method_names()) == list(CATALOG)
    assert options.METHODS.replace(" or ", ", ").split(", ") == list(CATALOG)


def test_the_tables_of_the_readme_are_those_of_the_catalogue():
    page = README.read_text(encoding="utf-8")
    assert with_methods(page) == page, "run python tests/support/methods_table.py"


def test_the_catalogue_does_not_import_torch():
    code = "import sys, ricciq.estimators.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
