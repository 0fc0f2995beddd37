"""What every quantizer of the catalogue keeps to, and what is made of its entry."""

from __future__ import annotations

import ast
import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from methods_table import README
from quantizers_table import with_quantizers
from torch import Tensor, nn

import ricciq
from ricciq.cli.keys import recipe_keys
from ricciq.convert.plan import plan_conversion
from ricciq.convert.rewrite import convert, quantized_layers
from ricciq.deploy.modules import DeployedActivation, DeployedLayer
from ricciq.deploy.packing import pack, unpack
from ricciq.errors import RecipeError
from ricciq.estimators.apply import DiscreteWeight
from ricciq.layers.registry import kind_of
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.calibration import calibrate
from ricciq.quant.catalog import ACTIVATIONS, QUANTIZERS, WEIGHTS, Entry, WeightEntry
from ricciq.quant.config import QuantizerConfig
from ricciq.quant.grid import Bits, count_codes
from ricciq.quant.weight import WeightQuantizer
from ricciq.recipe import Recipe
from ricciq.recipe.sections import QuantizationSection
from ricciq.system.journal import Journal
from ricciq.training.oscillation import Freezing
from ricciq.training.reconstruction import reconstruct
from ricciq.training.stages import Progression

weights = pytest.mark.parametrize("name", WEIGHTS)
weights_and_widths = pytest.mark.parametrize(
    ("name", "bits"), [(name, bits) for name, entry in WEIGHTS.items() for bits in entry.widths]
)
activations = pytest.mark.parametrize("name", ACTIVATIONS)
activations_and_widths = pytest.mark.parametrize(
    ("name", "bits"), [(name, bits) for name, entry in ACTIVATIONS.items() for bits in entry.widths]
)
every = pytest.mark.parametrize(
    ("key", "name"), [(key, name) for key, catalog in QUANTIZERS.items() for name in catalog]
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weight() -> Tensor:
    """(rows, in, height, width), of rows of different sizes."""
    return normal(6, 4, 3, 3) * torch.logspace(-2, 0, 6).view(-1, 1, 1, 1)


@pytest.fixture
def made(name: str, bits: Bits, weight: Tensor) -> WeightQuantizer:
    """A quantizer of weights as a layer gets it."""
    return QuantizerConfig(name).quantizer_for(weight, bits)


def columns(quantizer: WeightQuantizer) -> Tensor:
    return quantizer.scale.view(-1, 1, 1, 1)


# The grid


@weights_and_widths
def test_a_grid_has_increasing_int8_codes_that_its_width_can_tell_apart(made, bits):
    grid = made.grid
    codes = grid.codes.float()
    assert 1 < len(codes) <= count_codes(bits)
    assert (codes.diff() > 0).all()
    assert torch.equal(codes, codes.round().clamp(-127, 127))
    assert (grid.low, grid.high) == (codes[0], codes[-1])


@weights_and_widths
def test_a_number_goes_to_the_nearest_code(made):
    grid = made.grid
    codes = grid.codes.float()
    assert torch.equal(grid.round(codes.clone()), codes)
    ratio = torch.linspace(1.5 * grid.low, 1.5 * grid.high, 3001)
    before = ratio.clone()
    rounded, nearest = grid.round(ratio), (ratio[:, None] - codes).abs().amin(1)
    torch.testing.assert_close((ratio - rounded).abs(), nearest, rtol=0, atol=1e-5)
    assert torch.equal(codes[grid.index(ratio)], rounded)
    assert torch.equal(ratio, before)


@weights_and_widths
def test_a_grid_says_what_is_true_of_its_codes(made):
    grid = made.grid
    codes = grid.codes.tolist()
    assert grid.is_consecutive == (codes == list(range(grid.low, grid.high + 1)))
    assert not grid.has_zero or 0 in codes
    assert grid.symmetric == ({-code for code in codes} == set(codes))


@weights_and_widths
def test_a_cell_ends_half_the_distance_to_the_next_code_away(made):
    grid = made.grid
    codes = grid.codes.float()
    half = codes.diff() / 2
    for side, inner, expected in ((1.0, codes[:-1], half), (-1.0, codes[1:], half)):
        found = torch.as_tensor(grid.half_cell(torch.full_like(inner, side), inner))
        torch.testing.assert_close(found.expand_as(inner), expected)


@weights_and_widths
def test_a_mask_passes_what_lies_between_the_ends(made):
    grid = made.grid
    ratio = torch.linspace(grid.low, grid.high, 100)
    assert (grid.mask(torch.ones(100), ratio) == 1).all()
    beyond = torch.tensor([grid.low - 0.01, grid.high + 0.01])
    masked = grid.mask(torch.ones(2), beyond)
    assert not masked.any() or masked.all()  # all pass where nothing is ever clipped


# Weights


@weights_and_widths
def test_the_discretized_weight_is_codes_times_scales(made, weight):
    codes, given = made.codes(weight), weight.clone()
    assert (codes.dtype, codes.shape) == (torch.int8, weight.shape)
    assert set(codes.unique().tolist()) <= set(made.grid.codes.int().tolist())
    for mode in (made.train(), made.eval()):
        torch.testing.assert_close(mode(weight).detach(), codes * columns(made))
    assert torch.equal(weight, given)


@weights_and_widths
def test_calibration_finds_positive_scales_that_err_less_than_zeros(made, weight):
    assert made.scale.shape == (len(weight),)
    assert made.scale.isfinite().all()
    assert (made.scale > 0).all()
    used = made.standardize(weight)
    assert (made(weight) - used).square().sum() < used.square().sum()


@weights_and_widths
def test_rows_of_zeros_stay_finite(name, bits, weight):
    for dead in (slice(0, 2), slice(None)):
        weight = weight.detach().clone()
        weight[dead] = 0
        weight.requires_grad_()
        quantizer = QuantizerConfig(name).quantizer_for(weight.detach(), bits)
        quantizer(weight).square().sum().backward()
        found = [quantizer.scale, weight.grad, *quantizer.residual(weight.detach())]
        found += [p.grad for p in quantizer.parameters() if p.requires_grad]
        assert all(x.isfinite().all() for x in found)
        assert (quantizer.scale > 0).all()


@weights_and_widths
def test_gradients_reach_what_is_within_the_range_and_every_parameter(made, weight):
    with torch.no_grad():
        made.log_scale -= 0.3  # so that some weights are clipped, where any can be
    weight = weight.requires_grad_()
    made.train()(weight).backward(normal(*weight.shape, seed=1).abs() + 0.1)
    residual, mask = made.residual(weight.detach())
    assert residual.abs().max() <= 1
    assert not residual[~mask].any()
    assert torch.equal(weight.grad.flatten(1) != 0, mask)
    assert made.log_scale.requires_grad == made.learns_scale
    for parameter in made.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        assert parameter.grad is None or parameter.grad.isfinite().all()


@weights_and_widths
def test_residuals_and_errors_are_those_of_rounding(made, weight):
    residual, mask = made.residual(weight)
    error, cells = made.error(weight), made.cells(weight)
    expected = (made.standardize(weight) - made(weight)).detach().flatten(1)
    inner = mask & (residual.abs() < 1)  # where nothing is masked, some lie beyond the last cell
    torch.testing.assert_close(error[inner], expected[inner], rtol=1e-4, atol=1e-6)
    assert not error[~mask].any()
    assert torch.equal(error.sign(), residual.sign())
    assert cells.shape == weight.shape
    codes = made.codes(weight)
    assert len({*zip(cells.flatten().tolist(), codes.flatten().tolist(), strict=True)}) == len(
        codes.unique()
    )


@weights_and_widths
def test_a_perturbation_acts_in_training_alone_and_stays_on_the_grid(made, weight):
    before = made.eval()(weight).detach()
    made.perturbation = lambda ratio, cell: ratio + cell
    assert torch.equal(made.eval()(weight).detach(), before)
    after = made.train()(weight).detach()
    assert not torch.equal(after, before)
    ratio = after / columns(made)
    torch.testing.assert_close(made.grid.round(ratio.clone()), ratio, rtol=1e-4, atol=1e-4)


@weights_and_widths
def test_a_state_can_be_stored(made, name, bits, weight):
    fresh = QuantizerConfig(name).quantizer_for(normal(*weight.shape, seed=2), bits)
    assert "log_scale" in made.state_dict()
    fresh.load_state_dict(copy.deepcopy(made.state_dict()))
    assert torch.equal(fresh(weight), made(weight))


@weights_and_widths
def test_what_the_layer_does_to_its_weight_is_kept_apart(name, bits, weight):
    own = nn.Sequential(nn.Flatten(1), nn.Unflatten(1, weight.shape[1:]))
    quantizer = QuantizerConfig(name).quantizer_for(weight, bits, own)
    assert quantizer.layer_standardize is own
    assert torch.equal(quantizer(weight), QuantizerConfig(name).quantizer_for(weight, bits)(weight))


@weights_and_widths
def test_codes_can_be_packed(made, bits, weight):
    codes = made.codes(weight)
    planes = pack(codes, bits, made.grid)
    assert torch.equal(unpack(planes, codes.numel()), codes.flatten().int())


@weights_and_widths
def test_the_deployed_layer_has_its_codes_and_computes_its_output(name, bits, weight):
    conv, norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    conv.weight.data, norm.weight.data[::2] = weight.clone(), -1.0
    norm.running_mean.copy_(normal(6))
    kind = kind_of(conv)
    assert kind is not None
    layer = kind.from_float(conv, bits, 8, norm, QuantizerConfig(name)).eval()
    x = normal(2, 4, 5, 5).abs()
    calibrate(layer, [x])
    deployed = DeployedLayer(layer)
    flipped = torch.where(norm.weight < 0, -1, 1).view(-1, 1, 1, 1)
    held, stretch = deployed.weight_quantizer.integer_codes(), layer.integer_weights().stretch
    assert torch.equal(held, layer.weight_quantizer.codes(layer.weight) * flipped * stretch)
    expected = layer(x).detach()
    torch.testing.assert_close(deployed(x), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


# What weights can do, and the features that ask


@weights_and_widths
def test_a_width_changes_where_the_entry_says_so(made, name, weight):
    entry = WEIGHTS[name]
    if not entry.can_change_width:
        kind = type(made) if made.bits != 8 else entry.load()
        with pytest.raises(ValueError, match=r"cannot change (its|their) width"):
            kind(len(weight), 2).set_bits(4)
        return
    assert set(entry.widths) == set(WeightEntry("", "").widths)  # a stage may have any
    for bits in entry.widths:
        made.set_bits(bits)
        made.calibrate(weight)
        fresh = QuantizerConfig(name).quantizer_for(weight, bits)
        assert made.bits == bits
        assert torch.equal(made(weight), fresh(weight))


@weights_and_widths
def test_freezing_takes_what_can_be_frozen(made, weight):
    items = [DiscreteWeight("conv", weight.clone(), made)]
    if made.why_not_frozen:
        with pytest.raises(RecipeError, match=f"weights of conv, {made.why_not_frozen}; take dam"):
            Freezing(items, 0.01)
        return
    freezing = Freezing(items, 0.01)
    freezing.get_buffer("frozen0").fill_(True)
    freezing(1.0)
    torch.testing.assert_close(items[0].weight, made(weight).detach())
    assert torch.equal(made.codes(items[0].weight), made.codes(weight))
    levels = made.grid.codes
    for parameter in made.parameters():
        if parameter is not made.log_scale:
            parameter.data += 0.1
    assert torch.equal(made.grid.codes, levels)  # no training moves them


@weights
def test_what_is_standardized_cannot_be_frozen_and_does_not_learn_rounding(name, weight):
    quantizer = QuantizerConfig(name).quantizer_for(weight, 2, nn.Sequential(nn.Identity()))
    assert quantizer.why_not_frozen == "which are standardized"
    assert not quantizer.can_learn_rounding


@weights_and_widths
def test_rounding_is_learned_where_it_can_be(name, bits, monkeypatch):
    monkeypatch.setattr("ricciq.training.reconstruction.tune", lambda *_: None)
    torch.manual_seed(0)
    images = normal(32, 4, 5, 5)
    teacher = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3)).eval()
    plan = plan_conversion(teacher, images[:2], bits, 8, edge_bits=bits)
    model = convert(copy.deepcopy(teacher), plan, QuantizerConfig(name))
    calibrate(model, [images])
    layers = quantized_layers(model)
    before = {key: layer.latent.detach().clone() for key, layer in layers.items()}
    codes = {key: layer.weight_quantizer.codes(before[key]) for key, layer in layers.items()}
    reconstruct(model, [images], 20, Journal())
    for key, layer in layers.items():
        quantizer, after = layer.weight_quantizer, layer.latent.detach()
        assert isinstance(quantizer, WeightQuantizer)
        if quantizer.can_learn_rounding:
            assert quantizer.grid.is_consecutive
            torch.testing.assert_close(quantizer(after).detach(), after)
            assert (quantizer.codes(after).int() - codes[key].int()).abs().max() <= 1
        else:
            assert torch.equal(after, before[key])


# Activations


@activations_and_widths
def test_activations_go_to_codes_times_the_scale(name, bits):
    quantizer = QuantizerConfig(activations=name).activation_quantizer(bits)
    grid, zero_point = quantizer.grid, 1
    quantizer.set_range(0.3, zero_point)
    assert (grid.low, grid.high) == (0, 2**bits - 1)
    x = torch.linspace(-1, 0.35 * grid.high, 500).view(5, 100)
    y = quantizer(x).detach()
    codes = y / 0.3 + zero_point
    torch.testing.assert_close(codes, codes.round().clamp(0, grid.high), rtol=0, atol=1e-4)
    torch.testing.assert_close(quantizer(y).detach(), y)
    assert quantizer(torch.zeros(3)).eq(0).all()


@activations_and_widths
def test_gradients_of_activations_reach_what_is_within_the_range(name, bits):
    quantizer = QuantizerConfig(activations=name).activation_quantizer(bits).train()
    quantizer.set_range(0.3, 1)
    x = torch.linspace(-2, 0.3 * 2 * quantizer.grid.high, 500).view(5, 100).requires_grad_()
    quantizer(x).sum().backward()
    residual, mask = quantizer.residual(x.detach())
    assert mask.any()
    assert not mask.all()
    assert torch.equal(x.grad, mask.float())
    assert residual.abs().max() <= 1
    assert quantizer.log_scale.requires_grad == quantizer.learns_scale
    assert (quantizer.log_scale.grad is not None) == quantizer.learns_scale


@activations_and_widths
def test_activations_are_calibrated_stored_and_deployed(name, bits):
    config, x = QuantizerConfig(activations=name), normal(20, 30)
    quantizer = config.activation_quantizer(bits).eval()
    model = nn.Sequential(quantizer)
    calibrate(model, [x])
    assert 0 < quantizer.scale < math.inf
    assert (quantizer(x) - x).square().sum() < x.square().sum()
    deployed = DeployedActivation(quantizer)
    torch.testing.assert_close(deployed(x), quantizer(x).detach())
    fresh = config.activation_quantizer(bits)
    assert set(quantizer.state_dict()) == {"log_scale", "zero_point"}
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x), quantizer(x))


@activations
def test_a_width_of_activations_changes_where_the_entry_says_so(name):
    entry, x = ACTIVATIONS[name], normal(20, 30)
    for bits in entry.widths if entry.can_change_width else ():
        quantizer = QuantizerConfig(activations=name).activation_quantizer(2)
        quantizer.set_bits(bits)
        fresh = QuantizerConfig(activations=name).activation_quantizer(bits)
        assert torch.equal(quantizer(x), fresh(x))


# Entries, and what is made of them


@every
def test_an_entry_loads_a_class_of_its_kind(key, name):
    base = {"weight_quantizer": WeightQuantizer, "act_quantizer": ActivationQuantizer}[key]
    assert issubclass(QUANTIZERS[key][name].load(), base)


@every
def test_a_recipe_names_it_and_takes_its_widths_alone(key, name):
    entry, width = QUANTIZERS[key][name], {"weight_quantizer": "weight_bits"}.get(key, "act_bits")
    for bits in type(entry)("", "").widths:
        values = {"quantization": {key: name, width: bits}}
        if bits in entry.widths:
            quantization = Recipe.from_values(values).quantization
            assert name in (quantization.config.weights, quantization.config.activations)
            continue
        with pytest.raises(
            RecipeError, match=f"{key} {name} does not support a width of {bits}; give 1"
        ) as e:
            Recipe.from_values(values)
        assert "\n" not in str(e.value)


@every
def test_a_recipe_has_stages_where_the_width_can_change(key, name):
    values = {"quantization": {key: name}, "training": {"progressive": [8], "epochs": 2}}
    if QUANTIZERS[key][name].can_change_width:
        Recipe.from_values(values)
        return
    with pytest.raises(RecipeError, match=f"bits, which {key} {name} does not support; use lsq"):
        Recipe.from_values(values)


@weights
def test_stages_set_and_restore_the_widths_of_a_model(name):
    if not WEIGHTS[name].can_change_width:
        pytest.skip("a recipe refuses stages for it")
    layer = kind_of(conv := nn.Conv2d(4, 6, 3)).from_float(conv, 2, 2, None, QuantizerConfig(name))
    stages = Progression(nn.Sequential(layer), [8], 2)
    for stage, bits in ((0, 8), (1, 2)):
        assert stages.enter(stage)
        stages.fit_weights(20)
        assert layer.weight_quantizer.bits == layer.input_quantizer.bits == bits
        assert layer.weight_quantizer.scale.isfinite().all()


@every
def test_its_words_fit_a_table(key, name):
    entry: Entry = QUANTIZERS[key][name]
    assert entry.line
    assert not set("|\n;") & set(entry.line)


def test_the_recipe_has_the_names_and_lines_of_the_catalogue():
    rows = {row["key"]: row for row in recipe_keys("quantization")}
    for key, catalog in QUANTIZERS.items():
        row = rows[f"quantization.{key}"]
        assert row["type"].split(" | ") == list(catalog)
        assert row["default"] == getattr(QuantizationSection(), key) == "lsq"
        assert all(f"{name}, {entry.line}" in row["description"] for name, entry in catalog.items())


def test_the_table_of_the_readme_is_that_of_the_catalogue():
    page = README.read_text(encoding="utf-8")
    assert with_quantizers(page) == page, "run python tests/support/quantizers_table.py"


def test_the_rest_of_the_package_reaches_a_quantizer_through_the_catalogue_alone():
    own = {
        entry.path.split(":")[0] for catalog in QUANTIZERS.values() for entry in catalog.values()
    }
    package = Path(ricciq.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name != "quant":
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            used = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
            assert not used & {f"ricciq.quant.{module}" for module in own}, path


def test_the_catalogue_does_not_import_torch():
    code = "import sys, ricciq.quant.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
