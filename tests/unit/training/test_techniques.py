"""Techniques of training: averages, BatchNorm statistics, stages, features, norms, rates."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ricciq.cli import main
from ricciq.convert.rewrite import convert, quantized_layers
from ricciq.deploy.export import export_onnx
from ricciq.deploy.modules import deploy
from ricciq.deploy.session import open_session, session_predictor
from ricciq.errors import RecipeError
from ricciq.evaluation import evaluate
from ricciq.layers.base import KeptNorm
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.calibration import LogHistogram, calibrate, choose_range
from ricciq.quant.fake_quantize import SLOPE_SAMPLES
from ricciq.quant.weight import WeightQuantizer
from ricciq.recipe import Recipe, TrainingSection
from ricciq.runs.folder import RunFolder
from ricciq.system.journal import Journal
from ricciq.system.tables import read_csv
from ricciq.system.tensor_files import load_tensors
from ricciq.training import loop as train
from ricciq.training.loop import correction_of, finetune
from ricciq.training.losses import feature_distance
from ricciq.training.metrics import Tally
from ricciq.training.optim import WithFeatures, optimizer_and_schedule
from ricciq.training.state import TrainingState
from ricciq.training.step import Trainer
from ricciq.workflows import compare as study
from ricciq.workflows.compare import Trial
from ricciq.workflows.job import prepare
from ricciq.workflows.saved import rebuild
from ricciq.workflows.session import Session

CPU = torch.device("cpu")
RECIPE = Recipe().override(
    {
        "model.name": "digits_resnet8",
        "data.name": "digits",
        "data.batch_size": 40,
        "data.train_samples": 120,
        "data.augmentation": {"pad_crop": 1, "hflip": 0.0},
        "quantization.weight_bits": 2,
        "quantization.act_bits": 2,
        "training.epochs": 1,
        "training.lr": 5e-3,
        "training.save_minutes": 0,  # after every step
        "device": "cpu",
    }
)
STEPS = 3  # an epoch


class Run:
    """A converted, calibrated digits net and what is needed to train it in a folder."""

    def __init__(self, path: Path, changes: dict | None = None) -> None:
        path.mkdir(exist_ok=True)
        self.folder, self.recipe = RunFolder(path), RECIPE.override(changes or {})
        self.job = prepare(self.recipe, Session(CPU))
        self.model = self.job.model
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        bits = self.recipe.quantization
        convert(self.model, self.job.plan, bits.config)
        calibrate(self.model, self.images(), bits.scale_search)

    def images(self) -> list[Tensor]:
        """Batches to calibrate on: 40, 40 and 20 images."""
        return [images for images, _ in self.job.loader("fit", samples=100)]

    def train(self, resume: bool = False, images: bool = True) -> TrainingState:
        return finetune(
            self.model,
            self.job.loader("fit", training=True),
            self.job.loader("holdout"),
            self.recipe,
            correction_of(self.recipe),
            device=CPU,
            folder=self.folder,
            teacher=self.teacher,
            metadata=self.job.metadata,
            journal=Journal(),
            calibration_images=self.images if images else None,
            resume=resume,
        )

    def trainer(self) -> Trainer:
        correction = correction_of(self.recipe)
        return Trainer(self.model, self.recipe, correction, CPU, STEPS, self.teacher)

    def batch(self) -> tuple[Tensor, Tensor]:
        return next(iter(self.job.loader("fit")))

    def best(self) -> dict[str, Tensor]:
        return load_tensors(self.folder.best)[0]


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state, which later steps do not change."""
    return copy.deepcopy(model.state_dict())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def act_quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    return [m for m in model.modules() if isinstance(m, ActivationQuantizer)]


def stop_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Interrupt the run after so many steps, each of which is saved."""
    original, taken = Trainer.step, []

    def step(*args, **kwargs):
        if len(taken) == number:
            raise KeyboardInterrupt
        taken.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(Trainer, "step", step)


def stop_between_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the run before the first step of the second epoch."""
    original = train.set_epoch

    def set_epoch(loader, epoch, *args):
        if epoch == 1:
            raise KeyboardInterrupt
        original(loader, epoch, *args)

    monkeypatch.setattr(train, "set_epoch", set_epoch)


def stopped_and_resumed(path: Path, changes: dict, stop: Callable) -> tuple[Run, TrainingState]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            Run(path, changes).train()
    resumed = Run(path, changes)
    with torch.no_grad():  # no value of the new model may remain
        for tensor in resumed.model.state_dict().values():
            tensor.fill_(1)
    return resumed, resumed.train(resume=True)


def assert_same_end(resumed: Run, whole: Run) -> None:
    for name in ("best", "last"):
        tensors, others = (load_tensors(getattr(r.folder, name))[0] for r in (resumed, whole))
        assert same(tensors, others), name
    progress = [
        json.loads(run.folder.state.read_text()) | {"seconds": 0} for run in (resumed, whole)
    ]
    assert progress[0] == progress[1]
    rows = [read_csv(run.folder.summary) for run in (resumed, whole)]
    for row in (*rows[0], *rows[1]):
        del row["images_per_second"], row["waiting_share"]
    assert rows[0] == rows[1]


# A moving average of the weights


def test_the_outcome_is_the_exponential_average_of_the_steps(tmp_path):
    run = Run(tmp_path, {"training.ema": 0.75})
    trainer = run.trainer()
    trainer.begin_epoch()
    expected = {name: tensor.double() for name, tensor in state(run.model).items()}
    for update in range(3):
        assert trainer.step([run.batch()], Tally(), update, measure=False)
        for name, tensor in run.model.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * tensor.double()
            else:  # a count
                expected[name] = tensor.double()
    outcome, model = trainer.outcome.state_dict(), run.model.state_dict()
    assert outcome.keys() == model.keys()
    for name, tensor in outcome.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    for name in ("conv1.weight", "conv1.weight_quantizer.log_scale", "conv1.norm.running_mean"):
        assert not torch.allclose(outcome[name], model[name], rtol=1e-4)


def test_without_an_average_the_outcome_is_the_model(tmp_path):
    run = Run(tmp_path)
    trainer = run.trainer()
    assert trainer.outcome is run.model
    assert not any(name.startswith("ema") for name in trainer.changing.state_dict())


def test_the_average_is_evaluated_and_saved(tmp_path):
    run = Run(tmp_path, {"training.ema": 0.75})
    run.train()
    best, last = run.best(), load_tensors(run.folder.last)[0]
    prefixes = "model.ema.module.", "model.model."
    averaged, trained = (
        {n.removeprefix(p): t for n, t in last.items() if n.startswith(p)} for p in prefixes
    )
    assert same(best, averaged)
    assert same(trained, run.model.state_dict())
    assert not same(best, trained)
    (row,) = read_csv(run.folder.summary)
    run.model.load_state_dict(best)
    held = evaluate({"best": run.model.eval()}, run.job.loader("holdout"))["best"]
    assert held.loss == pytest.approx(float(row["holdout_loss"]), rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_with_an_average_ends_as_an_uninterrupted_one(tmp_path):
    changes = {"training.ema": 0.75, "training.epochs": 2}
    whole = Run(tmp_path / "whole", changes)
    done = whole.train()

    def stop(monkeypatch):
        stop_in_step(monkeypatch, STEPS + 1)

    resumed, after = stopped_and_resumed(tmp_path / "stopped", changes, stop)
    assert (after.chosen_epoch, after.steps) == (done.chosen_epoch, 2 * STEPS)
    assert_same_end(resumed, whole)


def test_a_step_without_finite_gradients_does_not_change_the_average(tmp_path):
    run = Run(tmp_path, {"training.ema": 0.75})
    trainer = run.trainer()
    trainer.begin_epoch()
    assert trainer.step([run.batch()], Tally(), 0, measure=False)  # now it lags behind the model
    before = state(trainer.outcome)
    assert not same(before, run.model.state_dict())
    images, targets = run.batch()
    images[3, 0, 0, 0] = math.nan
    assert not trainer.step([(images, targets)], Tally(), 1, measure=False)
    assert same(before, trainer.outcome.state_dict())


# BatchNorm statistics estimated again


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


@pytest.mark.parametrize("ema", [None, 0.75])
def test_the_saved_statistics_are_those_of_the_training_images(tmp_path, ema):
    plain = Run(tmp_path / "plain", {"training.ema": ema})
    plain.train()
    run = Run(tmp_path / "anew", {"training.ema": ema, "training.reestimate_bn": True})
    run.train()
    best, without = run.best(), plain.best()
    averages = {n for n in best if n.endswith(("running_mean", "running_var"))}
    counts = {n for n in best if n.endswith("num_batches_tracked")}
    rest = best.keys() - averages - counts
    assert same({n: best[n] for n in rest}, {n: without[n] for n in rest})  # trained alike

    run.model.load_state_dict(best)
    seen: dict[str, list[Tensor]] = {name: [] for name in norms(run.model)}
    for name, norm in norms(run.model).items():
        norm.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    with torch.no_grad():
        for images in run.images():  # each batch has the same weight
            run.model.train()(images)
    assert len(seen) > 5
    for name, batches in seen.items():
        rows = [x.transpose(0, 1).flatten(1) for x in batches]
        mean = torch.stack([x.mean(1) for x in rows]).mean(0)
        var = torch.stack([x.var(1) for x in rows]).mean(0)
        for kind, expected in (("mean", mean), ("var", var)):
            found = best[f"{name}.running_{kind}"]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(found, without[f"{name}.running_{kind}"], rtol=1e-2)


def test_frozen_statistics_cannot_be_estimated_again():
    with pytest.raises(RecipeError, match="freeze_bn and reestimate_bn contradict") as caught:
        RECIPE.override({"training.freeze_bn": True, "training.reestimate_bn": True})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"training.reestimate_bn": True}, {"training.progressive": [8], "training.epochs": 2}],
)
def test_recipes_that_need_calibration_images_are_refused_without(tmp_path, change):
    with pytest.raises(ValueError, match="calibration_images is None; the recipe's progress"):
        Run(tmp_path, change).train(images=False)
    assert list(tmp_path.iterdir()) == []


def test_other_recipes_need_no_calibration_images(tmp_path):
    assert Run(tmp_path, {"training.ema": 0.5}).train(images=False).epoch == 1


# Progressive quantization

STAGES = {"training.progressive": [8, 4], "training.epochs": 3}


def widths(model: nn.Module) -> list[tuple[int, int]]:
    """Bits of weights and of inputs, layer by layer."""
    layers = quantized_layers(model).values()
    return [(layer.weight_quantizer.bits, layer.input_quantizer.bits) for layer in layers]


def test_an_epoch_has_the_widths_of_its_stage(tmp_path, monkeypatch):
    run, seen = Run(tmp_path, STAGES | {"training.ema": 0.75}), []
    begin = Trainer.begin_epoch

    def begin_epoch(self):
        seen.append((widths(self.model), widths(self.outcome)))
        assert self.outcome is not self.model
        begin(self)

    monkeypatch.setattr(Trainer, "begin_epoch", begin_epoch)
    planned = widths(run.model)
    done = run.train()
    inner = len(planned) - 2
    assert planned == [(8, 8), *[(2, 2)] * inner, (8, 8)]
    for bits, (of_model, of_outcome) in zip((8, 4, 2), seen, strict=True):
        assert of_model == of_outcome == [(8, 8), *[(bits, bits)] * inner, (8, 8)]
    assert widths(run.model) == planned
    assert (done.epoch, done.chosen_epoch, done.stage) == (3, 3, 2)
    layer = quantized_layers(run.model)["layer1.0.conv1"]
    assert layer.weight_quantizer.codes(layer.latent).unique().tolist() == [-2, -1, 0, 1]
    assert layer.input_quantizer.grid.high == 3


@pytest.mark.parametrize("search", [1, 100])
def test_a_stage_begins_with_newly_calibrated_scales(tmp_path, search):
    run = Run(tmp_path, STAGES | {"training.ema": 0.75, "quantization.scale_search": search})
    trainer = run.trainer()
    for epoch, bits in enumerate((8, 4, 2)):
        trainer.enter(epoch, run.images)
        for layer in quantized_layers(run.model).values():
            fresh = WeightQuantizer(len(layer.latent), layer.weight_quantizer.bits)
            fresh.calibrate(layer.latent, search)
            assert torch.equal(layer.weight_quantizer.log_scale, fresh.log_scale)
        again = copy.deepcopy(run.model)
        calibrate(again, run.images(), search)
        for found, expected in zip(act_quantizers(run.model), act_quantizers(again), strict=True):
            assert torch.equal(found.log_scale, expected.log_scale)
            assert torch.equal(found.zero_point, expected.zero_point)
        assert same(trainer.outcome.state_dict(), run.model.state_dict())
        assert quantized_layers(run.model)["layer1.0.conv1"].weight_quantizer.bits == bits
        trainer.begin_epoch()
        trainer.step([run.batch()], Tally(), STEPS * epoch, measure=False)
        moved = state(run.model)
        trainer.enter(epoch, run.images)  # as a run that resumes within a stage
        assert same(run.model.state_dict(), moved)


def test_the_chosen_epoch_is_one_of_the_last_stage(tmp_path, monkeypatch):
    # 72 hold-out images: the standard error at 70 % is 5 percentage points.
    accuracies = iter([99.0, 98.0, 70.0, 60.0])
    original = train.evaluate

    def judge(predictors, batches):
        metrics = original(predictors, batches)["holdout"]
        return {"holdout": type(metrics)(**{**vars(metrics), "top1": next(accuracies)})}

    monkeypatch.setattr(train, "evaluate", judge)
    run = Run(tmp_path, {"training.progressive": [8], "training.epochs": 4})
    done = run.train()
    assert (done.best_top1, done.chosen_epoch, done.chosen_top1) == (70.0, 3, 70.0)
    assert load_tensors(run.folder.best)[1]["epoch"] == 3


TWO_STAGES = {"training.progressive": [8], "training.epochs": 2, "training.ema": 0.75}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("uninterrupted"), TWO_STAGES)
    run.train()
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [
        lambda monkeypatch: stop_in_step(monkeypatch, 1),
        stop_between_epochs,
        lambda monkeypatch: stop_in_step(monkeypatch, STEPS + 1),
    ],
    ids=["within the first stage", "at the boundary", "within the last stage"],
)
def test_an_interrupted_run_in_stages_ends_as_an_uninterrupted_one(uninterrupted, tmp_path, stop):
    resumed, _ = stopped_and_resumed(tmp_path, TWO_STAGES, stop)
    assert_same_end(resumed, uninterrupted)
    assert widths(resumed.model) == widths(uninterrupted.model)


@pytest.mark.parametrize("most", [None, 256])
def test_the_slope_belongs_to_the_width(tmp_path, most):
    # By default 4 codes have a slope and 16 have none; with max_codes=256 both have one.
    run = Run(tmp_path, STAGES | {"method.max_codes": most})
    assert run.recipe.method.name == "ricci"
    trainer, estimator = run.trainer(), correction_of(run.recipe).estimator
    inner = quantized_layers(run.model)["layer1.0.conv1"].input_quantizer
    outer = quantized_layers(run.model)["conv1"].input_quantizer
    slopes = {bits: estimator.slope(2**bits, SLOPE_SAMPLES, 0.0) for bits in (4, 2)}
    assert torch.equal(inner.slope, slopes[2])  # of the plan, before the first epoch
    trainer.enter(0, run.images)
    assert all(quantizer.slope is None for quantizer in act_quantizers(run.model))
    trainer.enter(1, run.images)
    if most is None:
        assert inner.slope is None
    else:
        assert torch.equal(inner.slope, slopes[4])
    trainer.enter(2, run.images)
    assert torch.equal(inner.slope, slopes[2])
    assert outer.slope is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"training.progressive": [4, 8]},
            r"progressive \[4, 8\] is not in descending order; write it",
        ),
        ({"training.progressive": [4, 4]}, r"progressive \[4, 4\] is not in descending order"),
        (
            {"training.freezing": 0.1},
            "freezing fixes the codes that progressive changes; remove one",
        ),
        ({"training.epochs": 2}, r"at least 3 epochs, one for each stage, not 2; raise"),
        (
            {"quantization.weight_quantizer": "codebook"},
            "weight_quantizer codebook does not support",
        ),
        (
            {"quantization.weight_quantizer": "dorefa"},
            "weight_quantizer dorefa does not support; use lsq",
        ),
        ({"training.progressive": [9]}, "training.progressive"),
        ({"training.progressive": [4, 1]}, "training.progressive"),
    ],
)
def test_invalid_stages_are_refused(change, sentence):
    with pytest.raises(RecipeError, match=sentence) as caught:
        RECIPE.override(STAGES | change)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("the command line is invalid")


# The learning rate of scales


def rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of every parameter by name, each of them in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(parameter)], (group["lr"], group["weight_decay"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.parametrize("extra", [{}, {"warmup_epochs": 1, "min_lr": 1e-5}, {"weight_decay": 0.0}])
def test_scales_have_their_own_rate_during_the_whole_schedule(tmp_path, extra):
    model = Run(tmp_path).model
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    plain, scaled = (TrainingSection(epochs=4, scale_lr=factor, **extra) for factor in (1.0, 0.125))
    usual, usual_schedule = optimizer_and_schedule(model, plain, STEPS)
    own, own_schedule = optimizer_and_schedule(model, scaled, STEPS)
    assert len({id(p) for group in own.param_groups for p in group["params"]}) == len(trainable)
    seen = set()
    for update in range(1, 4 * STEPS):
        expected, found = rates(model, usual), rates(model, own)
        assert found.keys() == expected.keys() == trainable
        for name, (lr, decay) in found.items():
            factor = 0.125 if name.endswith("log_scale") else 1.0
            assert lr == pytest.approx(factor * expected[name][0], rel=1e-9), name
            assert decay == expected[name][1], name
        seen.add(found["conv1.weight"][0])
        usual_schedule.step_update(update)
        own_schedule.step_update(update)
    assert len(seen) > 8  # the schedule moves


def test_the_change_of_a_scale_is_scaled(tmp_path):
    changes = []
    for factor in (1.0, 0.125):
        run = Run(tmp_path, {"training.scale_lr": factor, "training.opt": "sgd"})
        before, trainer = state(run.model), run.trainer()
        trainer.step([run.batch()], Tally(), 0, measure=False)
        changes.append({n: t - before[n] for n, t in run.model.state_dict().items()})
    name = "layer1.0.conv1.weight_quantizer.log_scale"
    assert changes[0][name].abs().max() > 0
    torch.testing.assert_close(changes[1][name], 0.125 * changes[0][name], rtol=0.01, atol=1e-6)
    assert torch.equal(changes[0]["fc.weight"], changes[1]["fc.weight"])


def test_fixed_scales_have_no_parameter_group(tmp_path):
    changes = {"quantization.weight_quantizer": "fixed", "quantization.act_bits": 32}
    model = Run(tmp_path, changes).model
    optimizer, _ = optimizer_and_schedule(model, TrainingSection(scale_lr=0.5), STEPS)
    found = rates(model, optimizer)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.endswith("log_scale") for name in found)
    assert all(group["params"] for group in optimizer.param_groups)


def test_parameters_that_a_model_exempts_from_decay_stay_exempt():
    model = timm.create_model("test_vit", num_classes=2)
    assert "pos_embed" in model.no_weight_decay()
    usual, own = (
        optimizer_and_schedule(model, TrainingSection(scale_lr=factor), 1)[0]
        for factor in (1.0, 0.5)
    )
    assert rates(model, usual)["pos_embed"][1] == 0
    assert rates(model, own) == rates(model, usual)


# Features of the teacher


def test_features_are_compared_by_direction():
    features = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    assert feature_distance(features, features).item() == pytest.approx(0, abs=1e-6)
    assert feature_distance(features, -features).item() == pytest.approx(4)
    axes = torch.eye(2)
    assert feature_distance(axes, axes.flip(0)).item() == pytest.approx(2)
    units = [x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True) for x in (features, teacher)]
    expected = (units[0] - units[1]).square().sum(1).mean().item()
    assert feature_distance(features, teacher).item() == pytest.approx(expected, rel=1e-5)
    scales = torch.tensor([0.1, 1.0, 3.0, 10.0, 100.0]).view(-1, 1, 1, 1)
    assert feature_distance(scales * features, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_the_model_with_features_gives_the_same_logits(tmp_path):
    run = Run(tmp_path)
    images, _ = run.batch()
    with torch.no_grad():
        logits, features = WithFeatures(run.model.eval())(images)
        assert torch.equal(logits, run.model(images))
        assert torch.equal(features, run.model.forward_features(images))


def test_the_distance_of_features_trains_the_student_and_not_the_teacher(tmp_path):
    gradients = []
    for share in (0.0, 5.0):
        run = Run(tmp_path, {"training.distill_features": share})
        run.teacher.requires_grad_(True)
        trainer, tally = run.trainer(), Tally()
        trainer.optimizer.zero_grad = lambda: None
        trainer.begin_epoch()
        assert trainer.step([run.batch()], tally, 0, measure=False)
        assert all(parameter.grad is None for parameter in run.teacher.parameters())
        gradients.append({n: p.grad for n, p in run.model.named_parameters()} | {"loss": tally})
    without, with_features = gradients
    assert torch.equal(without["fc.weight"], with_features["fc.weight"])  # behind the features
    assert not torch.allclose(without["conv1.weight"], with_features["conv1.weight"], rtol=0.01)
    assert with_features["loss"].means[0] > without["loss"].means[0]


def test_a_model_without_features_is_refused(tiny_quantized):
    model, _ = tiny_quantized(2, 2)
    recipe = RECIPE.override({"training.distill_features": 1.0})
    with pytest.raises(RecipeError, match=r"distill_features needs the features .* TinyNet") as it:
        Trainer(model, recipe, correction_of(recipe), CPU, 1, copy.deepcopy(model))
    assert "\n" not in str(it.value)
    Trainer(model, recipe, correction_of(recipe), CPU, 1)  # no teacher, no need of features


# weight_norm: rows keep their norm


def row_norms(weight: Tensor) -> Tensor:
    return weight.detach().flatten(1).norm(dim=1)


def test_conversion_is_the_same_with_norms_kept(tmp_path):
    images = Run(tmp_path).batch()[0]
    logits = []
    for kept in (False, True):
        model = Run(tmp_path, {"quantization.weight_norm": kept}).model.eval()
        assert any(isinstance(m, KeptNorm) for m in model.modules()) == kept
        with torch.no_grad():
            logits.append(model(images))
    assert torch.equal(*logits)


def test_a_step_turns_rows_and_keeps_their_norms(tmp_path):
    run = Run(tmp_path, {"quantization.weight_norm": True, "training.lr": 0.05})
    layers = quantized_layers(run.model)
    before = {name: layer.latent.detach().clone() for name, layer in layers.items()}
    trainer = run.trainer()
    trainer.begin_epoch()
    assert trainer.step([run.batch()], Tally(), 0, measure=False)
    for name, layer in layers.items():
        used, first = layer.weight_quantizer.standardize(layer.latent), row_norms(before[name])
        torch.testing.assert_close(row_norms(used), first, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(row_norms(layer.latent), first, rtol=1e-3)
        assert not torch.allclose(used, before[name], rtol=1e-3)


def test_a_row_of_zeros_keeps_its_norm_and_has_finite_gradients():
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    kept = KeptNorm(weight)
    assert torch.equal(kept(weight), weight)
    kept(2 * weight + torch.tensor([[0.0, 0.0], [1.0, 0.0]])).sum().backward()
    assert weight.grad.isfinite().all()


@pytest.mark.slow
def test_a_model_with_norms_kept_is_rebuilt_and_exported(tmp_path):
    run = Run(tmp_path, {"quantization.weight_norm": True, "training.lr": 0.02})
    run.train()
    rebuilt = rebuild(run.folder.best)
    images = torch.cat([images for images, _ in run.job.loader("holdout")])
    model = run.model.eval().to(memory_format=torch.contiguous_format)  # as the rebuilt one is
    layer = quantized_layers(rebuilt.model)["layer1.0.conv1"]
    stored = layer.weight_quantizer.standardize.norms.flatten()
    assert torch.equal(stored, row_norms(run.teacher.layer1[0].conv1.weight))
    assert not torch.allclose(stored, row_norms(layer.latent), rtol=1e-3)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(rebuilt.model(images), expected, rtol=1e-5, atol=1e-5)
        deployed = deploy(rebuilt.model)
        logits = deployed(images)
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() >= 0.95
    path = export_onnx(deployed, tmp_path / "model.onnx", rebuilt.metadata.preprocessing)
    found = session_predictor(open_session(path, optimize=False, threads=1), path)(images)
    # Where a number lies between two codes, the two may round it differently.
    assert ((found - logits).abs().amax(1) < 1e-4).float().mean() >= 0.95


# scale_search


@pytest.mark.parametrize("bits", [1, 2, 4, 8, "ternary"])
def test_a_single_candidate_covers_the_largest_weight(bits):
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(len(weight), bits)
    quantizer.calibrate(weight, 1)
    ends = quantizer.scale * quantizer.grid.high
    torch.testing.assert_close(ends, weight.abs().amax(1), rtol=1e-5, atol=0)
    quantizer.calibrate(weight)
    assert (quantizer.scale * quantizer.grid.high <= weight.abs().amax(1) * 1.0001).all()
    if bits != 8:  # of many candidates, a smaller scale is better
        assert (quantizer.scale * quantizer.grid.high < weight.abs().amax(1) * 0.999).any()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["relu", "normal", "silu", "negative"])
def test_a_single_candidate_covers_the_observed_activations(bits, kind):
    x = 3 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    make = {"relu": torch.relu, "silu": nn.functional.silu, "negative": lambda x: -x.abs()}
    x = make.get(kind, lambda x: x)(x)
    histogram = LogHistogram()
    histogram(x)
    scale, zero_point = choose_range(histogram, bits, 1)
    # Values up to half a scale beyond the last code are rounded to it.
    assert -(zero_point + 0.5) * scale <= histogram.low * (1 - 1e-6)
    assert histogram.high * (1 - 1e-6) <= (2**bits - 1 - zero_point + 0.5) * scale
    if kind == "relu":
        assert (zero_point, scale) == (0, pytest.approx(histogram.high / (2**bits - 1)))


def test_a_recipe_sets_the_number_of_candidates(tmp_path):
    clipped = []
    for search in (1, 100):
        model = Run(tmp_path, {"quantization.scale_search": search}).model
        layers = quantized_layers(model).values()
        beyond = [
            bool(
                (
                    item.weight_quantizer.ratio(item.latent)
                    > item.weight_quantizer.grid.high + 1e-3
                ).any()
            )
            for item in layers
        ]
        clipped.append(sum(beyond))
    assert clipped[0] == 0
    assert clipped[1] > 5


# Recipe keys in a comparison


def test_a_trial_changes_the_keys_that_it_names():
    method = "ricci:training.ema=0.9:quantization.weight_norm=true"
    recipe = Trial(method, 1.0, 0).recipe(Recipe())
    wanted = {"training.ema": 0.9, "quantization.weight_norm": True}
    assert recipe == Recipe().override(wanted)
    assert (recipe.training.ema, recipe.quantization.weight_norm) == (0.9, True)
    both = Trial("ricci:rho=0.5:training.progressive=[8,4]", 2.0, 3).recipe(Recipe())
    assert both.method.changes == {"rho": 0.5}
    assert both.training.progressive == (8, 4)
    assert both.training.lr == 2 * Recipe().training.lr
    assert both.seed == 3


@pytest.mark.parametrize(
    "change",
    ["training.ema.x=1", "training.foo=1", "training.ema=2", "nothing.ema=0.9", "training.ema=["],
)
def test_an_invalid_key_is_refused(change):
    with pytest.raises(
        RecipeError, match=f"^--methods ricci:{change.split('=', maxsplit=1)[0]}="
    ) as it:
        Trial(f"ricci:{change}", 1.0, 0).recipe(Recipe.from_values({"training": {"ema": 0.5}}))
    assert "\n" not in str(it.value)


def test_null_removes_a_value_of_the_recipe():
    base = Recipe().override({"training.ema": 0.9, "training.clip_grad": 1.0})
    recipe = Trial("ricci:training.ema=null", 1.0, 0).recipe(base)
    assert (recipe.training.ema, recipe.training.clip_grad) == (None, 1.0)


def test_the_rate_of_a_method_is_scaled_like_that_of_the_recipe():
    recipes = [Trial("ricci:training.lr=0.01", scale, 0).recipe(Recipe()) for scale in (1, 3)]
    assert [recipe.training.lr for recipe in recipes] == pytest.approx([0.01, 0.03])


def test_the_command_keeps_lists_together(monkeypatch, tmp_path, capsys):
    seen = []

    def compare(recipe, methods, *_args, **_options):
        seen.append((recipe.model.name, methods))
        return {"results": []}, tmp_path

    monkeypatch.setattr(study, "compare", compare)
    methods = ["ste", "ricci:training.progressive=[8,4]:training.ema=0.9", "ewgs:delta=0.1"]
    arguments = ["compare", "digits_resnet8", "--data", "digits", "--seeds", "2", "--json"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--methods", ",".join(methods)])
    assert not stop.value.code, capsys.readouterr().err
    assert seen == [("digits_resnet8", methods)]
