"""A folder of nothing but images: what stands for labels, what is refused, what a run says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from command import Answer, json_of, ricciq
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ricciq.convert.rewrite import convert
from ricciq.data.dataset import ImageData
from ricciq.data.open import open_data
from ricciq.data.preprocessing import Preprocessing
from ricciq.errors import DataError
from ricciq.evaluation import evaluate
from ricciq.quant.calibration import calibrate
from ricciq.recipe import Recipe
from ricciq.runs.folder import RunFolder
from ricciq.system.tables import read_csv
from ricciq.system.tensor_files import load_tensors
from ricciq.training.loop import correction_of
from ricciq.training.metrics import Tally
from ricciq.training.step import Trainer
from ricciq.workflows import saved as trained
from ricciq.workflows.job import Job, prepare
from ricciq.workflows.session import Session
from ricciq.workflows.train import train

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DIGITS = Preprocessing((1, 8, 8), (0.3054,), (0.3760,))
IMAGES = 200
PIXELS = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
LABELS = load_digits().target


def check_refusal(answer: Answer, code: int, *words: str) -> None:
    """One sentence with these words, and nothing else."""
    last = answer.err.strip().splitlines()[-1]
    assert answer.code == code, last
    assert answer.out == ""
    assert last.startswith("ricciq: ")
    assert "Traceback" not in answer.err
    for word in words:
        assert word in last


def write(folder: Path, numbers: range) -> Path:
    """Scanned digits as files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.fromarray(PIXELS[number]).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("flat") / "images", range(IMAGES))


def recipe_for(folder: Path | str, changes: dict[str, Any] | None = None) -> Recipe:
    values: dict[str, Any] = {
        "model.name": "digits_resnet8",
        "data.name": str(folder),
        "data.batch_size": 40,
        "training.epochs": 1,
        "device": "cpu",
    }
    return Recipe().override(values | (changes or {}))


def job_for(folder: Path | str, changes: dict[str, Any] | None = None) -> Job:
    return prepare(recipe_for(folder, changes), Session(CPU), pseudo_labels=False)


def drain(data: ImageData, split: str, **options: Any) -> tuple[Tensor, Tensor]:
    """All images and targets of a split."""
    defaults = {"batch_size": 64, "workers": 0, "training": False}
    batches = data.loader(split, DIGITS, **(defaults | options))
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


def numbers_of(images: Tensor) -> list[int]:
    """Which of the digits images are, by their pixels."""
    known = {pixels.tobytes(): number for number, pixels in enumerate(PIXELS[:IMAGES])}
    assert len(known) == IMAGES
    pixels = ((images * 0.3760 + 0.3054) * 255).round().to(torch.uint8)
    return [known[image.numpy().tobytes()] for image in pixels]


# The images


def test_a_tenth_is_for_validation_always_the_same_and_never_trained_on(folder: Path) -> None:
    found = [open_data(str(folder), None) for _ in range(2)]
    splits = {name: numbers_of(drain(found[0], name)[0]) for name in ("fit", "holdout", "val")}
    again = {name: numbers_of(drain(found[1], name)[0]) for name in splits}
    assert splits == again
    assert len(splits["val"]) == IMAGES // 10
    assert len(splits["holdout"]) == round(0.05 * 0.9 * IMAGES)
    everything = [number for split in splits.values() for number in split]
    assert sorted(everything) == list(range(IMAGES))
    # Names often tell classes or days, so neither the first images nor the last will do.
    assert min(splits["val"]) < IMAGES / 3
    assert max(splits["val"]) > 2 * IMAGES / 3


def test_the_hold_out_grows_within_the_training_images(folder: Path) -> None:
    small, large = (open_data(str(folder), None, share) for share in (0.05, 0.4))
    held = [set(numbers_of(drain(data, "holdout")[0])) for data in (small, large)]
    assert held[0] < held[1]
    assert len(held[1]) == 72
    assert numbers_of(drain(small, "val")[0]) == numbers_of(drain(large, "val")[0])


def test_they_have_no_classes_and_are_grey(folder: Path, tmp_path: Path) -> None:
    data = open_data(str(folder), None)
    assert (data.labelled, data.class_names, data.channels) == (False, [], 1)
    for number in range(20):
        Image.fromarray(np.dstack([PIXELS[number]] * 3)).save(tmp_path / f"{number}.PNG")
    assert open_data(str(tmp_path), None).channels == 3


def test_what_is_hidden_or_no_image_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, range(20))
    write(tmp_path / ".thumbnails", range(3))
    (tmp_path / ".21.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("some digits")
    data = open_data(str(tmp_path), None)
    assert [len(drain(data, split)[0]) for split in ("fit", "holdout", "val")] == [17, 1, 2]


def test_labelled_data_is_labelled(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write(tmp_path / split / name, range(2))
    assert open_data(str(tmp_path), None).labelled
    assert open_data("digits", None).labelled


@pytest.mark.parametrize(("count", "words"), [(1, ["has 1 images"]), (19, ["has 19", "20"])])
def test_too_few_images_are_refused(tmp_path: Path, count: int, words: list[str]) -> None:
    write(tmp_path / "few", range(count))
    answer = ricciq("quantize", "digits_resnet8", "--data", tmp_path / "few")
    check_refusal(answer, 3, str(tmp_path / "few"), "give at least 20", *words)


def test_images_beside_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "both", range(30))
    write(tmp_path / "both" / "cat", range(3))
    answer = ricciq("quantize", "digits_resnet8", "--data", tmp_path / "both")
    check_refusal(answer, 3, "images and folders", str(tmp_path / "both" / "cat"), "train/CLASS")


def test_images_beside_train_and_val_are_no_data_without_labels(tmp_path: Path) -> None:
    write(tmp_path, range(30))
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write(tmp_path / split / name, range(2))
    assert open_data(str(tmp_path), None).class_names == ["cat", "dog"]
    (tmp_path / "val").rename(tmp_path / "others")
    with pytest.raises(DataError, match="neither val/ nor validation/"):
        open_data(str(tmp_path), None)


# What stands for labels


def test_answers_of_the_float_model_stand_where_it_is_judged_and_nothing_elsewhere(
    folder: Path,
) -> None:
    job = job_for(folder)
    assert job.data.class_names == [str(number) for number in range(10)]
    for split in ("fit", "holdout", "val"):
        assert set(drain(job.data, split)[1].tolist()) == {-1}
    job = prepare(job.recipe, Session(CPU))
    assert set(drain(job.data, "fit")[1].tolist()) == {-1}
    for split in ("holdout", "val"):
        images, targets = drain(job.data, split)
        with torch.no_grad():
            assert torch.equal(targets, job.model.eval()(images).argmax(1))
        found = evaluate({"float": job.model}, job.loader(split))["float"]
        assert found.top1 == 100


def test_answers_do_not_touch_labels() -> None:
    data, job = open_data("digits"), prepare(recipe_for("digits"), Session(CPU))
    for split in ("fit", "holdout", "val"):
        assert torch.equal(drain(data, split)[1], drain(job.data, split)[1])


@pytest.mark.parametrize("features", [0.0, 0.5])
def test_a_step_is_what_it_would_be_with_labels_that_do_not_count(
    folder: Path, features: float
) -> None:
    job = job_for(folder, {"training.distill_features": features})
    teacher = copy.deepcopy(job.model).eval().requires_grad_(False)
    model = convert(job.model, job.plan, job.recipe.quantization.config)
    images, targets = next(iter(job.loader("fit")))
    labels = torch.from_numpy(LABELS[numbers_of(images)])
    calibrate(model, [images])
    outcomes = []
    for given in (targets, labels):
        student, tally = copy.deepcopy(model), Tally()
        trainer = Trainer(student, job.recipe, correction_of(job.recipe), CPU, 4, teacher)
        trainer.begin_epoch()
        assert trainer.step([(images, given)], tally, 0, measure=False)
        outcomes.append((student, tally, trainer))
    (unlabelled, counted, trainer), (labelled, expected, _) = outcomes
    assert float(counted.loss) == float(expected.loss) > 0
    states = unlabelled.state_dict(), labelled.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert not torch.equal(states[0]["fc.weight"], model.state_dict()["fc.weight"])
    # What counts as right is what the teacher says, also to a student that disagrees.
    unlabelled.fc.weight.data.neg_()
    _, logits, judged = trainer._loss(images, targets, trainer.forward)
    with torch.no_grad():
        assert torch.equal(judged, teacher(images).argmax(1))
    assert (judged != logits.argmax(1)).all()


def test_the_head_keeps_the_classes_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = timm.create_model("digits_resnet8", num_classes=7).state_dict()
    save_file(weights, tmp_path / "seven.safetensors")
    changes = {"model.checkpoint": tmp_path / "seven.safetensors", "training.epochs": 0}
    recipe = recipe_for(folder, changes | {"quantization.reconstruction": 0})
    job = prepare(recipe, Session(CPU))
    assert job.model.num_classes == job.data.num_classes == 7
    assert torch.equal(job.model.fc.weight, weights["fc.weight"])
    assert job.messages == []
    (tmp_path / "run").mkdir()
    model = train(job, Session(CPU, folder=RunFolder(tmp_path / "run"))).model
    again = trained.rebuild(tmp_path / "run")
    assert again.metadata.class_names == [str(number) for number in range(7)]
    images, _ = drain(job.data, "val")
    with torch.no_grad():
        assert torch.equal(again.model(images), model.eval()(images))
    with_labels = job_for(
        "digits", changes | {"training.epochs": 1}
    )  # where there are labels, they decide
    assert with_labels.model.num_classes == 10


@pytest.mark.parametrize(
    ("flags", "recipe", "words"),
    [
        (["--bits", "32"], "", ["no labels", "--bits 1 to 8"]),
        ([], "training: {distill: 0}", ["no labels", "training.distill"]),
        ([], "training: {distill: 0, distill_features: 1}", ["no labels", "training.distill"]),
        (["--mixup", "0.2"], "", ["no labels", "--mixup"]),
        (["--cutmix", "1"], "", ["no labels", "--cutmix"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_what_needs_labels_is_refused(
    folder: Path, tmp_path: Path, flags: list[str], recipe: str, words: list[str], more: list[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe or "seed: 0")
    command = ["quantize", "digits_resnet8", "--data", folder, "--recipe", file, *flags, *more]
    check_refusal(ricciq(*command, "--output", tmp_path / "run"), 2, str(folder), *words)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_plan(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["quantize", "digits_resnet8", "--data", folder, "--bits", "auto:2.5", "--dry-run"]
    answer = ricciq(*command, "--batch-size", "auto", "--json")
    assert answer.code == 0, answer.err
    plan = json.loads(answer.out)
    assert len({layer["weight_bits"] for layer in plan["layers"]}) > 2
    assert list(tmp_path.iterdir()) == []


# A whole run


class Run(NamedTuple):
    folder: Path
    report: dict[str, Any]
    shown: Answer


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three bits, one epoch."""
    path = tmp_path_factory.mktemp("run") / "run"
    flags = ["--bits", "3", "--epochs", "1", "--batch-size", "40"]
    answer = ricciq("quantize", "digits_resnet8", "--data", folder, *flags, "--output", path)
    assert answer.code == 0, answer.err
    return Run(path, json.loads((path / "report.json").read_text()), answer)


def test_a_report_says_that_accuracy_is_agreement(run: Run) -> None:
    assert run.report["labelled"] is False
    assert run.report["float"]["top1"] == 100.0
    assert run.report["float"]["samples"] == run.report["onnx"]["samples"] == IMAGES // 10
    assert run.report["quantized"]["top1"] > 70
    page = (run.folder / "report.md").read_text()
    for text in (page, run.shown.out):
        assert "agreement with float" in text
        assert "float class in top 5" in text
        assert "| top-1 |" not in text
    assert "The images have no labels" in page
    assert "its predictions replace labels" in run.shown.err
    assert "training.distill 0.5 counts as 1" in run.shown.err
    _, about = load_tensors(run.folder / "best.safetensors")
    assert about["recipe"]["training"]["distill"] == 1
    assert "top-1" not in run.shown.out


def test_agreement_while_training_is_with_the_float_model(run: Run) -> None:
    (row,) = read_csv(run.folder / "summary.csv")
    assert float(row["train_top1"]) > 50
    assert float(row["holdout_top1"]) == run.report["training"]["holdout_top1"] > 50


def eval_(*arguments: str | Path) -> dict[str, Any]:
    return json_of("eval", *arguments)


def test_evaluation_needs_a_reference_and_counts_agreement_with_it(run: Run, folder: Path) -> None:
    for target in (run.folder, run.folder / "model.onnx"):
        refused = ricciq("eval", target, "--data", folder)
        check_refusal(refused, 2, str(folder), "no labels", "--reference")
    found = eval_(run.folder / "model.onnx", "--data", folder, "--reference",
                  run.folder / "float.onnx")  # fmt: skip
    assert found["labelled"] is False
    assert found["samples"] == IMAGES // 10
    assert found["top1"] == found["agreement"] == run.report["onnx"]["top1"]
    assert found["reference_top1"] == 100.0
    turned = eval_(run.folder / "float.onnx", "--data", folder, "--reference", run.folder)
    assert turned["top1"] == turned["agreement"]
    assert turned["reference_top1"] == 100.0


def test_a_reference_that_differs_is_what_counts(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trained.open_target

    def one_further(path: Path, given: trained.Given) -> trained.Target:
        target = original(path, given)
        if path.name != "float.onnx":
            return target
        predict: Callable[[Tensor], Tensor] = target.predict
        return target._replace(predict=lambda images: predict(images).roll(1, 1))

    monkeypatch.setattr("ricciq.workflows.evaluate.open_target", one_further)
    found = eval_(run.folder, "--data", folder, "--reference", run.folder / "float.onnx")
    assert found["top1"] == found["agreement"] == 0.0
    assert found["reference_top1"] == 100.0


def test_what_was_trained_without_labels_is_measured_with_them(run: Run, tmp_path: Path) -> None:
    found = eval_(run.folder / "model.onnx", "--data", "digits")
    assert found["labelled"] is True
    assert found["top1"] > 70
    names = [f"digit {number}" for number in range(10)]  # the run has not heard of them
    for split in ("train", "val"):
        for number in range(60):
            place = tmp_path / "ten" / split / names[LABELS[number]]
            write(place, range(number, number + 1))
    named = eval_(run.folder, "--data", tmp_path / "ten")
    assert named["labelled"] is True
    assert named["top1"] > 70


def test_data_with_another_number_of_classes_is_refused(run: Run, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write(tmp_path / "two" / split / name, range(2))
    for target in (run.folder, run.folder / "model.onnx"):
        answer = ricciq("eval", target, "--data", tmp_path / "two")
        check_refusal(answer, 3, "2 classes", "10", str(target))


@pytest.mark.parametrize("named", ["target", "reference"])
def test_what_has_names_and_what_has_none_agree_on_images(
    run: Run, folder: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trained.open_target

    def with_names(path: Path, given: trained.Given) -> trained.Target:
        target = original(path, given)
        if (path.name == "float.onnx") == (named == "reference"):
            return target._replace(class_names=[f"digit {number}" for number in range(10)])
        return target

    monkeypatch.setattr("ricciq.workflows.evaluate.open_target", with_names)
    found = eval_(run.folder, "--data", folder, "--reference", run.folder / "float.onnx")
    assert found["top1"] == found["agreement"] == run.report["quantized"]["top1"]


# A comparison


def compare(folder: Path, output: Path, *flags: str) -> Answer:
    command = ["compare", "digits_resnet8", "--data", folder, "--methods", "ste,ricci"]
    command += ["--seeds", "2", "--epochs", "1", "--bits", "4", "--batch-size", "40"]
    return ricciq(*command, "--output", output, *flags)


def test_a_comparison_on_validation_images_is_refused(folder: Path, tmp_path: Path) -> None:
    for flags in ([], ["--split", "val"]):
        answer = compare(folder, tmp_path / "study", *flags)
        check_refusal(answer, 2, "no labels", "--split holdout")
        assert not (tmp_path / "study").exists()


def test_a_comparison_counts_agreement_on_the_hold_out(folder: Path, tmp_path: Path) -> None:
    answer = compare(folder, tmp_path / "study", "--split", "holdout", "--json")
    assert answer.code == 0, answer.err
    verdict = json.loads(answer.out)
    assert verdict["split"] == "holdout"
    assert [result["method"] for result in verdict["results"]] == ["ste", "ricci"]
    assert all(result["mean"] > 50 for result in verdict["results"])
    job = prepare(recipe_for(folder), Session(CPU))
    trial = trained.rebuild(tmp_path / "study" / "trials" / "ste-lr1-seed0").model
    predictors: dict[str, nn.Module] = {"float": job.model, "trial": trial}
    agreement = evaluate(predictors, job.loader("holdout"))["trial"].agreement
    rows = read_csv(tmp_path / "study" / "rows.csv")
    assert float(rows[0]["top1"]) == agreement
