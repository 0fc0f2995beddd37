"""The fine-tuning loop: loss, files, resuming, and steps without finite gradients."""

import copy
import io
import json
import math
import random
import time

import numpy as np
import pytest
import torch
from digits_run import CPU, RECIPE, STEPS, Run
from PIL import Image
from rich.console import Console

from ricciq.convert.rewrite import quantized_layers
from ricciq.data.sources.files import ImageFiles
from ricciq.errors import CheckpointError, RecipeError, RicciqError, UsageError
from ricciq.estimators.apply import Correction
from ricciq.estimators.registry import METHODS
from ricciq.recipe import TrainingSection
from ricciq.runs.metadata import RunMetadata
from ricciq.system.journal import Journal
from ricciq.system.tables import read_csv
from ricciq.system.tensor_files import load_tensors, save_tensors
from ricciq.training import loop as train
from ricciq.training import step as trainer
from ricciq.training.loop import finetune
from ricciq.training.losses import loss_function
from ricciq.training.metrics import Tally
from ricciq.training.state import TrainingState
from ricciq.training.step import Trainer
from ricciq.workflows.job import prepare
from ricciq.workflows.session import Session

SUMMARY = [
    "epoch",
    "train_loss",
    "train_top1",
    "holdout_loss",
    "holdout_top1",
    "lr",
    "images_per_second",
    "skipped_steps",
    "waiting_share",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Uninterrupted runs by method, each made once."""
    made = {}

    def get(method: str) -> Run:
        if method not in made:
            path = tmp_path_factory.mktemp(method)
            freezing = 0.005 if method == "ste" else None  # has state to save
            changes = {"method.name": method, "training.freezing": freezing}
            made[method] = Run(path, RECIPE.override(changes))
            made[method].done = made[method].train()
        return made[method]

    return get


def entropy(logits: list[float], target: int) -> float:
    return math.log(sum(map(math.exp, logits))) - logits[target]


def divergence(teacher: list[float], logits: list[float]) -> float:
    """KL(teacher || student) of two vectors of logits."""
    p, q = ([math.exp(x) / sum(map(math.exp, v)) for x in v] for v in (teacher, logits))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


LOGITS = [[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]]
TEACHER = [[2.0, -1.0, 0.0], [0.0, 1.0, 1.0]]
TARGETS = [0, 2]


def loss(teacher: list[list[float]] | None, **settings: float) -> float:
    teacher_logits = None if teacher is None else torch.tensor(teacher)
    value = loss_function(
        torch.tensor(LOGITS), torch.tensor(TARGETS), teacher_logits, TrainingSection(**settings)
    )
    return value.item()


HARD = sum(map(entropy, LOGITS, TARGETS)) / 2


def test_without_a_teacher_the_loss_is_cross_entropy():
    assert loss(None, distill=1.0) == pytest.approx(HARD)
    uniform = sum(entropy(row, k) for row in LOGITS for k in range(3)) / 6
    assert loss(None, label_smoothing=0.3) == pytest.approx(0.7 * HARD + 0.3 * uniform)


@pytest.mark.parametrize("t", [1.0, 4.0])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_teachers_share_is_the_softened_divergence(share, t):
    def cooled(row):
        return [x / t for x in row]

    pairs = zip(TEACHER, LOGITS, strict=True)
    soft = t**2 * sum(divergence(cooled(a), cooled(b)) for a, b in pairs) / 2
    expected = (1 - share) * HARD + share * soft
    assert loss(TEACHER, distill=share, temperature=t) == pytest.approx(expected, rel=1e-5)


def test_a_student_that_agrees_with_its_teacher_has_no_soft_loss():
    assert loss(LOGITS, distill=1.0, temperature=3.0) == pytest.approx(0, abs=1e-6)
    assert loss(LOGITS, distill=0.5) == pytest.approx(0.5 * HARD)


@pytest.mark.parametrize("method", ["ricci", "ste"])
def test_training_lowers_the_loss_and_writes_its_files(finished, method):
    run = finished(method)
    folder, done = run.folder, run.done
    rows = read_csv(folder.summary)
    assert list(rows[0]) == SUMMARY
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert [row["skipped_steps"] for row in rows] == ["0", "0"]
    assert float(rows[1]["lr"]) < float(rows[0]["lr"]) < RECIPE.training.lr

    rows, layers = read_csv(folder.geometry), list(quantized_layers(run.model))
    assert [(row["epoch"], row["layer"]) for row in rows] == [(e, n) for e in "12" for n in layers]
    numbers = ["perturbation_start", "perturbation_end", "decay", "scalar_curvature", "divergence"]
    numbers += ["mismatch_cosine", "residual_cosine", "codes_changed"]
    assert list(rows[0]) == ["epoch", "layer", *numbers]
    assert all(math.isfinite(float(row[name])) for row in rows for name in numbers)
    assert all(0 <= float(row["codes_changed"]) <= 1 for row in rows)
    assert any(float(row["codes_changed"]) > 0 for row in rows)
    cosines = [float(row["mismatch_cosine"]) for row in rows]
    assert all(c == pytest.approx(1, abs=1e-5) for c in cosines) == (method == "ste")

    assert (done.epoch, done.steps, done.images, done.skipped) == (2, 2 * STEPS, 400, 0)
    state = json.loads(folder.state.read_text())
    assert state == load_tensors(folder.last)[1]["progress"] == vars(done)
    _, stored = load_tensors(folder.best)
    assert RunMetadata.from_dict(stored, folder.best) == run.job.metadata
    assert stored["epoch"] == done.chosen_epoch
    assert stored["holdout_top1"] <= done.best_top1


def test_without_a_folder_no_file_is_left_and_the_model_has_the_best_weights(finished, tmp_path):
    uninterrupted = finished("ste")
    run = Run(tmp_path / "run", uninterrupted.recipe)
    loaders = run.job.loader("fit", training=True), run.job.loader("holdout")
    done = finetune(run.model, *loaders, run.recipe, teacher=run.teacher)
    best = load_tensors(uninterrupted.folder.best)[0]
    assert all(torch.equal(best[name], value) for name, value in run.model.state_dict().items())
    assert done.chosen_epoch == uninterrupted.done.chosen_epoch
    assert list(run.folder.path.iterdir()) == []
    with pytest.raises(ValueError, match="give the folder"):
        finetune(run.model, *loaders, run.recipe, resume=True)


def test_the_methods_train_differently(finished):
    ricci, ste = finished("ricci").model.state_dict(), finished("ste").model.state_dict()
    assert not torch.equal(ricci["conv1.weight"], ste["conv1.weight"])


def stop_between_epochs(monkeypatch) -> None:
    original = train.set_epoch

    def set_epoch(loader, epoch, *args):
        if epoch == 1:
            raise KeyboardInterrupt
        original(loader, epoch, *args)

    monkeypatch.setattr(train, "set_epoch", set_epoch)


def stop_within_an_epoch(monkeypatch) -> None:
    original, taken = Trainer.step, []

    def step(*args, **kwargs):
        if len(taken) == STEPS + 2:
            raise KeyboardInterrupt
        taken.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(Trainer, "step", step)


def stop_while_saving(monkeypatch) -> None:
    original = train.save_tensors

    def save_tensors(path, tensors, metadata, **options):
        if path.name == "last.safetensors" and metadata["progress"]["epoch"] == 2:
            raise KeyboardInterrupt
        original(path, tensors, metadata, **options)

    monkeypatch.setattr(train, "save_tensors", save_tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stop"),
    [
        ("ricci", stop_between_epochs),
        ("ste", stop_between_epochs),
        ("ricci", stop_within_an_epoch),
        ("ricci", stop_while_saving),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(finished, tmp_path, method, stop):
    whole = finished(method)
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            Run(tmp_path, whole.recipe).train()
    resumed = Run(tmp_path, whole.recipe)
    with torch.no_grad():  # no value of the new model may remain
        for tensor in resumed.model.state_dict().values():
            tensor.fill_(1)
    done = resumed.train(resume=True)

    expected = whole.model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in resumed.model.state_dict().items())
    for name in ("best", "last"):
        tensors, others = (load_tensors(getattr(r.folder, name))[0] for r in (resumed, whole))
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)
    assert {**vars(done), "seconds": 0} == {**vars(whole.done), "seconds": 0}
    rows, others = read_csv(resumed.folder.summary), read_csv(whole.folder.summary)
    for row in (*rows, *others):
        del row["images_per_second"], row["waiting_share"]
    assert rows == others
    assert read_csv(resumed.folder.geometry) == read_csv(whole.folder.geometry)


def finite(run: Run) -> bool:
    return all(t.isfinite().all() for t in run.model.state_dict().values())


def test_a_step_without_finite_gradients_does_not_change_the_model(tmp_path):
    run = Run(tmp_path)
    images, targets = run.batch()
    trainer, tally = run.trainer(), Tally()
    trainer.begin_epoch()
    before = copy.deepcopy(run.model.state_dict())
    images[3, 0, 0, 0] = math.nan
    assert not trainer.step([(images, targets)], tally, 0, measure=True)
    after = run.model.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == []
    assert (tally.bad, tally.images, tally.means) == (1, 0, (0.0, 0.0))
    assert trainer.geometry == {}
    assert all(parameter.grad is None for parameter in run.model.parameters())


def spoil(monkeypatch, bad_steps: range) -> None:
    """Put a NaN into the images of these steps, counted over the whole run."""
    original, taken = Trainer.step, []

    def step(self, batches, tally, update, measure):
        ((images, targets),) = batches
        if len(taken) in bad_steps:
            images = images.clone()
            images[0] = math.nan
        taken.append(1)
        return original(self, [(images, targets)], tally, update, measure)

    monkeypatch.setattr(Trainer, "step", step)


def test_a_bad_batch_is_skipped_and_counted(tmp_path, monkeypatch):
    spoil(monkeypatch, range(1, 3))
    run = Run(tmp_path)
    done = run.train()
    rows = read_csv(run.folder.summary)
    assert [row["skipped_steps"] for row in rows] == ["2", "0"]
    assert (done.skipped, done.steps) == (2, 2 * STEPS)
    assert finite(run)
    assert all(math.isfinite(float(row["holdout_loss"])) for row in rows)


def test_a_bad_last_batch_leaves_the_epoch_without_geometry(tmp_path, monkeypatch):
    spoil(monkeypatch, range(2 * STEPS - 1, 2 * STEPS))
    run = Run(tmp_path)
    run.train()
    assert {row["epoch"] for row in read_csv(run.folder.geometry)} == {"1"}


def test_twenty_bad_batches_in_a_row_end_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, range(2, 1000))  # longer than an epoch
    run = Run(tmp_path, RECIPE.override({"training.epochs": 9}))
    with pytest.raises(RicciqError, match=r"20 steps in a row; lower --lr 0\.005") as caught:
        run.train()
    assert caught.value.exit_code == 1
    assert load_tensors(run.folder.last)[1]["progress"]["epoch"] == 22 // STEPS


def test_bad_batches_that_are_not_in_a_row_do_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MAX_BAD_STEPS", 2)
    spoil(monkeypatch, range(0, 1000, 2))
    assert Run(tmp_path).train().skipped == STEPS


@pytest.mark.parametrize(
    "change",
    [
        {"opt": "nope"},
        {"opt": "adahessian"},  # needs second derivatives
        {"opt": "fusedsgd"},  # needs APEX and CUDA
        {"sched": "nope"},
        {"sched": "none"},
        {"sched": "plateau"},  # steps on a metric
    ],
)
def test_an_unusable_optimizer_or_schedule_is_refused(change):
    ((key, value),) = change.items()
    recipe = RECIPE.override({f"training.{key}": value})
    with pytest.raises(RecipeError, match=rf"training\.{key} = {value} .*; choose ") as caught:
        prepare(recipe, Session(CPU))
    assert caught.value.exit_code == 2


def test_one_dimensional_parameters_have_no_weight_decay(tmp_path):
    run = Run(tmp_path)
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    decays = {
        names[id(parameter)]: group["weight_decay"]
        for group in run.trainer().optimizer.param_groups
        for parameter in group["params"]
    }
    assert decays.keys() == set(names.values())
    scales = [name for name in decays if name.endswith("log_scale")]
    assert len(scales) > len(quantized_layers(run.model))  # of weights and of activations
    for name, parameter in run.model.named_parameters():
        wanted = RECIPE.training.weight_decay if parameter.dim() > 1 else 0.0
        assert decays[name] == wanted, name


def test_gradients_are_clipped_after_the_correction(tmp_path):
    class Inflation(Correction):
        def __call__(self, weights, progress=0.0):  # noqa: ARG002
            for item in weights:
                item.weight.grad.mul_(1e6)

    run = Run(tmp_path, RECIPE.override({"training.clip_grad": 1e-3}))
    run.correction = Inflation(METHODS["ste"])
    trainer, norms = run.trainer(), []

    def record_norm(*_args):
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))

    trainer.optimizer.register_step_pre_hook(record_norm)
    trainer.step([run.batch()], Tally(), 0, measure=False)
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_mixed_precision_trains_on_the_cpu(tmp_path):
    run = Run(tmp_path, RECIPE.override({"amp": True, "training.epochs": 1}))
    seen = []
    run.model.conv1.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    before = run.model.conv1.weight.detach().clone()
    done = run.train()
    assert torch.bfloat16 in seen
    assert finite(run)
    assert done.skipped == 0
    assert not torch.equal(run.model.conv1.weight, before)
    assert run.model.conv1.weight.dtype == torch.float32


def test_without_bfloat16_the_loss_is_scaled(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "half_precision", lambda _: torch.float16)
    run = Run(tmp_path, RECIPE.override({"amp": True}))
    training, tally = run.trainer(), Tally()
    training.begin_epoch()
    # The first scale is too large for float16: such a step changes the scale and nothing else.
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0**30})
    before = run.model.conv1.weight.detach().clone()
    assert not training.step([run.batch()], tally, 0, measure=False)
    assert torch.equal(run.model.conv1.weight, before)
    while not training.step([run.batch()], tally, 0, measure=False):
        assert tally.bad < 30
    assert training.scaler.get_scale() == 2.0 ** (30 - tally.bad)
    assert not torch.equal(run.model.conv1.weight, before)
    assert finite(run)


def test_a_run_in_float16_resumes_with_its_loss_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "half_precision", lambda _: torch.float16)
    recipe = RECIPE.override({"amp": True, "training.epochs": 1})
    done = Run(tmp_path, recipe).train()
    assert done.scaler["scale"] == 2.0 ** (16 - done.skipped)
    assert Run(tmp_path, recipe).train(resume=True).scaler == done.scaler


def test_without_epochs_nothing_is_changed_or_written(tmp_path):
    run = Run(tmp_path, RECIPE.override({"training.epochs": 0}))
    before = copy.deepcopy(run.model.state_dict())
    assert run.train() == TrainingState(batch_size=40)
    assert all(torch.equal(t, before[n]) for n, t in run.model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_training_does_not_change_the_caller_s_random_state(tmp_path):
    run = Run(tmp_path, RECIPE.override({"training.epochs": 1}))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    run.train()
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        ([80.0, 90.0, 87.0, 85.0], 3),  # 72 hold-out images: the error at 90 % is 3.5 points
        ([97.2, 100.0, 98.61, 97.2], 3),  # a single image does not tell epochs apart
    ],
)
def test_the_latest_of_epochs_within_a_standard_error_is_chosen(
    tmp_path, monkeypatch, measured, chosen
):
    accuracies = iter(measured)
    original = train.evaluate

    def evaluate(predictors, batches):
        metrics = original(predictors, batches)["holdout"]
        assert metrics.samples == 72
        return {"holdout": type(metrics)(**{**vars(metrics), "top1": next(accuracies)})}

    monkeypatch.setattr(train, "evaluate", evaluate)
    run = Run(tmp_path, RECIPE.override({"training.epochs": 4}))
    done = run.train()
    assert (done.best_top1, done.chosen_epoch) == (max(measured), chosen)
    assert load_tensors(run.folder.best)[1]["holdout_top1"] == measured[chosen - 1]


@pytest.mark.parametrize("method", ["project", "ricci"])
def test_gradients_of_activations_are_corrected_if_the_recipe_says_so(tmp_path, method):
    gradients = []
    for target in ("weights", "activations"):
        recipe = RECIPE.override({"method.name": method, "method.target": target})
        trainer = Run(tmp_path / target, recipe).trainer()
        # So that the gradients of weights are compared before their own correction.
        trainer.correction = Correction(METHODS["ste"])
        trainer.optimizer.zero_grad = lambda: None
        trainer.step([Run(tmp_path, RECIPE).batch()], Tally(), STEPS, measure=False)
        gradients.append([w.weight.grad for w in trainer.weights])
    last, stem = -1, 0  # the gradient of the stem passes all quantizers, the last layer's none
    assert torch.equal(gradients[0][last], gradients[1][last])
    assert not torch.equal(gradients[0][stem], gradients[1][stem])


def test_the_default_method_corrects_activations_and_bounds_steps(tmp_path):
    run = Run(tmp_path, RECIPE)
    assert (run.correction.target, run.correction.estimator) == ("activations", METHODS["ricci"])
    trainer = run.trainer()
    layer = next(item for item in trainer.weights if item.quantizer.bits != 8)
    before = layer.weight.detach().clone()
    halves = layer.quantizer.half_cell(before)  # of the scale before the step
    for group in trainer.optimizer.param_groups:
        group["lr"] = 10.0
    trainer.step([run.batch()], Tally(), 0, measure=False)
    moved = (layer.weight.detach() - before).abs() / halves
    assert moved.max().item() == pytest.approx(run.correction.step_bound.half_cells, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"processes": 8}, UsageError, "saved by 8 processes, and this run has 1; start as many"),
        ({"speed": 1.0}, CheckpointError, r"another version of ricciq; .*--overwrite"),
    ],
    ids=["other processes", "another version"],
)
def test_a_state_that_cannot_be_resumed_is_refused(tmp_path, change, error, sentence):
    run = Run(tmp_path, RECIPE.override({"training.epochs": 1}))
    run.train()
    tensors, metadata = load_tensors(run.folder.last)
    metadata["progress"] |= change
    save_tensors(run.folder.last, tensors, metadata)
    with pytest.raises(error, match=sentence):
        Run(tmp_path, run.recipe).train(resume=True)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    gradients = []
    for parts in (1, 4):
        recipe = RECIPE.override({"training.freeze_bn": True, "training.clip_grad": 1e9})
        run = Run(tmp_path, recipe)
        trainer = run.trainer()
        trainer.optimizer.zero_grad = lambda: None
        trainer.begin_epoch()
        images, targets = run.batch()
        pieces = zip(images.chunk(parts), targets.chunk(parts), strict=True)
        tally = Tally()
        trainer.step(list(pieces), tally, 0, measure=False)
        gradients.append(run.model.conv1.weight.grad)
        assert tally.images == len(targets)
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_recomputed_activations_give_the_same_gradients(tmp_path):
    gradients = []
    for wanted in (False, True):
        recipe = RECIPE.override(
            {"training.grad_checkpointing": wanted, "training.freeze_bn": True}
        )
        run = Run(tmp_path, recipe)
        trainer = run.trainer()
        assert run.model.grad_checkpointing == wanted
        trainer.optimizer.zero_grad = lambda: None
        trainer.begin_epoch()
        trainer.step([run.batch()], Tally(), 0, measure=False)
        gradients.append(run.model.conv1.weight.grad)
        trainer.end()
        assert not run.model.grad_checkpointing
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_a_model_without_gradient_checkpointing_is_refused_at_once():
    changes = {
        "model": {"name": "legacy_seresnet18", "pretrained": False},
        "training.grad_checkpointing": True,
    }
    with pytest.raises(
        RecipeError,
        match=r"grad_checkpointing = true: this timm model does not .*; set it to false",
    ):
        prepare(RECIPE.override(changes), Session(CPU))


def test_frozen_batchnorms_keep_their_averages(tmp_path):
    run = Run(tmp_path, RECIPE.override({"training.epochs": 1, "training.freeze_bn": True}))
    before = {n: b.clone() for n, b in run.model.named_buffers() if "running" in n}
    run.train()
    after = dict(run.model.named_buffers())
    assert len(before) > 10
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_waiting_for_images_is_measured_and_a_remedy_named(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    for split, count in (("train", 12), ("val", 1)):
        for label in "ab":
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (8, 8)).save(folder / split / label / f"{number}.png")
    opened = ImageFiles.open

    def slowly(images: ImageFiles, index: int, mode: str) -> Image.Image:
        time.sleep(0.1)
        return opened(images, index, mode)

    monkeypatch.setattr(ImageFiles, "open", slowly)
    monkeypatch.setattr("ricciq.data.loader.usable_workers", lambda *_: 3)
    journal = Journal(Console(file=(said := io.StringIO()), width=200))
    values = {"data.name": str(folder), "data.batch_size": 8, "data.workers": 0}
    values |= {"data.train_samples": None, "training.epochs": 2}
    run = Run(tmp_path / "run", RECIPE.replace(values, "the test"))
    run.train(journal=journal)
    rows = read_csv(run.folder.summary)
    shares = [float(row["waiting_share"]) for row in rows]
    assert all(0.5 < share < 1 for share in shares)
    lines = said.getvalue().splitlines()
    assert sum("waiting for images" in line and "epoch " in line for line in lines) == len(rows)
    (advice,) = [line for line in lines if line.endswith("give --workers 3")]
    assert "% of the time was spent waiting for images" in advice
