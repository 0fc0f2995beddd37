"""A training that is killed goes on where it was, and ends with as many epochs and steps."""

from __future__ import annotations

import multiprocessing
import time

from networks import DEVICE, USUAL

from ricciq.recipe import Recipe
from ricciq.runs.folder import RunFolder
from ricciq.training.metrics import History
from ricciq.workflows.job import prepare
from ricciq.workflows.session import Session
from ricciq.workflows.train import train

EPOCHS = 3
RECIPE = Recipe().override({**USUAL, "training.epochs": EPOCHS})
FORKS = multiprocessing.get_context("fork")
"""They need not import everything anew; the process that forks has not used the GPU."""


def work(path, resume, answers):
    folder = RunFolder(path)
    session = Session(DEVICE, folder=folder, resume=resume)
    done = train(prepare(RECIPE, session), session).progress
    answers.put((done.epoch, done.steps, done.skipped, History.read(folder, EPOCHS).summary))


def start(path, resume):
    answers = FORKS.SimpleQueue()
    process = FORKS.Process(target=work, args=(path, resume, answers))
    process.start()
    return process, answers


def test_kill_and_resume(tmp_path):
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    process, answers = start(folder.path, False)
    while not folder.state.is_file():
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    assert answers.empty(), "it was over before it could be killed"
    process, answers = start(folder.path, True)
    process.join()
    assert process.exitcode == 0
    epochs, steps, skipped, rows = answers.get()
    assert (epochs, skipped) == (EPOCHS, 0)
    assert steps == EPOCHS * (1365 // 64)  # of the digits to train on, in whole batches
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
