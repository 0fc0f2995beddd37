"""A run says how long it will take, and `--dry-run --probe` before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import MAIN_JOB, json_of, ricciq

from ricciq.data.open import open_data
from ricciq.training.step import Trainer
from ricciq.workflows import quantize as pipeline

pytestmark = pytest.mark.slow

PROBE = [*MAIN_JOB, "--dry-run", "--probe"]
PARTS = ("start", "training", "export", "evaluation")


def lines(folder: Path) -> list[str]:
    return [line[20:] for line in (folder / "log.txt").read_text().splitlines()]


def test_a_run_says_what_is_left_after_its_first_steps_and_when_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "LEAST_SAID", 0.0)
    said: list[bool] = []
    report = pipeline.forecast_rest

    def interrupted(*arguments):
        said.append((tmp_path / "float.onnx").exists())
        if len(said) == 2:
            raise KeyboardInterrupt
        return report(*arguments)

    monkeypatch.setattr(pipeline, "forecast_rest", interrupted)
    command = [*MAIN_JOB, "--epochs", "3", "--output", tmp_path]
    assert ricciq(*command).code == 0
    text = lines(tmp_path)
    at = next(number for number, line in enumerate(text) if line.startswith("left to do: about "))
    assert text[at - 1].startswith("epoch 1/3 ")  # 21 steps
    assert text[at + 1].startswith("epoch 2/3 ")
    assert [part in text[at] for part in PARTS] == [False, True, True, True]
    assert ricciq(*command, "--overwrite").code == 130
    assert ricciq(*command, "--resume").code == 0
    assert said == [True] * 3
    assert sum(line.startswith("left to do: about ") for line in lines(tmp_path)) == 1


def test_a_short_run_says_nothing(finished_run):
    assert not any(line.startswith("left to do") for line in lines(finished_run))


def test_a_probe_takes_real_steps_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps: list[bool] = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda *a, **k: steps.append(step(*a, **k)))
    plan = json_of(*PROBE)
    assert steps == [True] * 20
    seconds = plan["seconds"]
    assert seconds["training"] >= plan["steps"] * seconds["step"] > 0
    assert all(seconds[part] > 0 for part in PARTS)
    assert seconds["whole"] == pytest.approx(sum(seconds[part] for part in PARTS))
    assert list(tmp_path.iterdir()) == []
    assert "seconds" not in json_of(*MAIN_JOB, "--dry-run")


def test_a_probe_of_little_data_in_float_and_without_labels(tmp_path):
    data = open_data("digits")
    for number in range(40):
        data.image("val", number, mode="L").save(tmp_path / f"{number:02}.png")
    unlabelled = ["--data", tmp_path, "--batch-size", "16", "--dry-run", "--probe"]
    plan = json_of("quantize", "digits_resnet8", *unlabelled)
    assert plan["steps"] < 20 * plan["epochs"]
    assert plan["seconds"]["training"] > 0
    answer = ricciq("quantize", "digits_resnet8", "--data", "digits", "--bits", "32", *PROBE[-2:])
    assert answer.code == 0, answer.err
    assert "; about " in " ".join(answer.out.split())


def test_what_finding_bits_takes_is_part_of_the_start(monkeypatch):
    def choose(job, _, session):
        session.seconds["choose"] = 1e6
        return job

    monkeypatch.setattr(pipeline, "choose_bits", choose)
    assert 1e6 < json_of(*PROBE)["seconds"]["start"] < 1.1e6


def test_a_step_that_does_not_fit_is_a_sentence(monkeypatch):
    forward = Trainer._loss

    def narrow(trainer, images, *others):
        if len(images) > 24:
            torch.empty(2**60)  # more than there is, for torch's own error
        return forward(trainer, images, *others)

    monkeypatch.setattr(Trainer, "_loss", narrow)
    answer = ricciq(*PROBE)
    assert answer.code == 1
    assert "but 16 fitted; give --batch-size 16" in answer.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ([*MAIN_JOB, "--probe"], "--probe needs --dry-run"),
        ([*PROBE, "--epochs", "0"], "0 epochs"),
    ],
)
def test_a_probe_without_sense_is_refused(line, words):
    answer = ricciq(*line)
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err
