"""What a terminal shows: help, tables, bars, quiet runs; and what a file or a pipe gets instead."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import check_command, ricciq, verbs
from processes import start
from rich.console import Console

from ricciq.report.terminal import FittingTable, plan_table, value_table
from ricciq.system import journal

QUANTIZE = ["quantize", "digits_resnet8", "--data", "digits"]
EXAMPLES = [
    line.removeprefix("Example: ")
    for verb in verbs()
    for line in map(str.strip, (verb.help or "").splitlines())
    if line.startswith("Example: ")
]
COLOUR = re.compile(r"\x1b\[[\d;]*[34]\dm")
BAR = """
from rich.console import Console
from ricciq.system.journal import Journal
with Journal(Console(stderr=True)).bar("epoch 1/3", 50) as advance:
    for _ in range(50):
        advance(lambda: "loss 1.234")
"""


def in_a_terminal(code: str, **environment: str) -> str:
    """What a Python program writes when both of its streams are a terminal."""
    ours, theirs = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=clean | {"TERM": "xterm-256color"} | environment,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert program.wait() == 0
    return written.decode()


def command(*words: str) -> str:
    return f"from ricciq.cli import main; main({list(words)})"


@pytest.mark.parametrize("verb", list(verbs()), ids=lambda verb: verb.name)
def test_every_verb_has_an_example(verb):
    assert "Example: ricciq " in verb.help


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_is_a_command_line_that_holds(line):
    check_command(shlex.split(line))


def test_examples_stand_on_lines_of_their_own():
    lines = [line.strip() for line in ricciq("quantize", "--help").out.splitlines()]
    assert len([line for line in lines if line.startswith("Example: ricciq quantize")]) == 3


def test_a_terminal_has_colours_unless_it_or_the_user_has_none():
    helped = command("recipes", "--help")
    assert COLOUR.search(in_a_terminal(helped))
    assert not COLOUR.search(in_a_terminal(helped, NO_COLOR="1"))
    assert "\x1b" not in in_a_terminal(helped, TERM="dumb")
    assert "\x1b" not in ricciq("recipes", "--help").out


def test_a_bar_fits_a_narrow_terminal_and_says_the_time_left():
    shown = in_a_terminal(BAR, COLUMNS="40")
    assert "\x1b[2K" in shown  # it is drawn over
    assert re.search(r"50/50.*0:00:00", shown)
    frames = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown).replace("\r", "\n").splitlines()
    assert max(map(len, frames)) <= 40
    assert "\x1b" not in in_a_terminal(BAR, TERM="dumb")


def test_without_training_every_part_over_images_has_a_bar(tmp_path):
    words = ["quantize", "digits_resnet8", "--data", "digits", "--epochs", "0", "--bits", "8"]
    shown = in_a_terminal(command(*words, "--output", str(tmp_path / "run")), COLUMNS="100")
    bars = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    for title in ("float model", "images", "float layers", "rounding", "evaluation"):
        assert re.search(rf"{title} .* \d+/\d+ [\d:-]+", bars), title


def test_where_no_bar_can_be_drawn_it_says_a_line_now_and_then(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(journal, "LINE_SECONDS", 0.0)
    with journal.Journal(Console(file=stream)).bar("epoch 1/3", 3) as advance:
        for _ in range(3):
            advance(lambda: "loss 1.2")
    first, second = stream.getvalue().splitlines()  # the end is told by what comes next
    assert re.fullmatch(r"epoch 1/3: 1/3 loss 1\.2 0:00:00 left", first)
    assert second.startswith("epoch 1/3: 2/3 ")
    monkeypatch.setattr(journal, "LINE_SECONDS", 60.0)
    with journal.Journal(Console(file=stream)).bar("epoch 2/3", 3) as advance:
        advance(lambda: "loss 1.2")
    assert "epoch 2/3" not in stream.getvalue()


def drawn(table: object, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    assert max(map(len, stream.getvalue().splitlines())) <= width
    return stream.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_cuts_no_value(width):
    layers = [
        {
            "name": f"blocks.{n}.attention.projection.of.values",
            "weight_bits": 2,
            "act_bits": 2,
            "parameters": 123456789 + n,
            "bytes": 30864197 + n,
        }
        for n in range(3)
    ]
    plan = {
        "model": "vit",
        "device": "cpu",
        "steps": 12,
        "batch_size": 64,
        "bytes": 1e6,
        "float_bytes": 4e6,
        "training_memory": 1e9,
        "layers": layers,
        "kept": [],
    }
    text = drawn(plan_table(plan), width)
    assert "…" not in text
    joined = re.sub(r"[^\w.]", "", text)
    assert all(str(layer["parameters"]) in joined for layer in layers)
    if width != 80:  # where names are broken over lines, with the cells beside them between
        assert all(layer["name"] in joined for layer in layers)
    assert "…" not in drawn(value_table({"a" * 50: "b" * 90}), width)


def test_a_column_that_must_not_wrap_does_not():
    table = FittingTable()
    table.add_column("name", no_wrap=True)
    table.add_column("model")
    table.add_row("n" * 30, "m" * 40)
    assert "n" * 30 in drawn(table, 60)
    assert "m" * 40 not in drawn(table, 60)
    assert "name" in drawn(table, 40)


@pytest.mark.slow
def test_a_quiet_run_says_nothing_but_its_json(tmp_path):
    (tmp_path / "short.yaml").write_text("quantization: {reconstruction: 0}\n")
    run = [*QUANTIZE, "--recipe", "short.yaml", "--bits", "1", "--epochs", "0", "--quiet"]

    def call() -> tuple[int | None, str, str]:
        process = start([*run, "--output", "run"], cwd=tmp_path)
        out, err = process.communicate()
        return process.returncode, out, err

    assert call() == (0, "", "")
    assert "float model:" in (tmp_path / "run" / "log.txt").read_text()
    code, _, err = call()
    assert code == 2
    assert "ricciq: --output run already has a run" in err


def test_a_quiet_plan_comes_as_json_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = ["compare", *QUANTIZE[1:], "--methods", "ste,ricci", "--seeds", "2", "--bits", "1"]
    for job in (QUANTIZE, study):
        assert ricciq(*job, "--dry-run", "--quiet") == (0, "", "")
        answer = ricciq(*job, "--dry-run", "--quiet", "--json")
        assert answer.err == ""
        assert json.loads(answer.out)["model"] == "digits_resnet8"


def test_a_planned_study_says_what_it_would_do_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = ["compare", *QUANTIZE[1:], "--methods", "ste,ricci:block=9", "--seeds", "3"]
    study += ["--lr-scales", "0.5,1", "--epochs", "2", "--batch-size", "32", "--dry-run"]
    plan = json.loads(ricciq(*study, "--json").out)
    assert plan["methods"] == ["ste", "ricci:block=9"]
    assert (plan["runs"], plan["seeds"], plan["lr_scales"]) == (12, [0, 1, 2], [0.5, 1.0])
    assert (plan["epochs"], plan["steps"]) == (2, 2 * (1365 // 32))
    assert plan["folder"].startswith("runs/")
    assert "ricci:block=9" in ricciq(*study).out
    assert ricciq(*study, "--data", "no/such/folder").code == 3
    assert ricciq(*study, "--methods", "ste,ricci:blok=9").code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_planned_export_opens_the_run_and_writes_nothing(finished_run, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    plan = json.loads(ricciq("export", folder, "--dry-run", "--json").out)
    assert plan == {
        "path": str(folder / "model.onnx"), "format": "qdq", "input": "float", "dry_run": True,
        "replaces": True,
    }  # fmt: skip
    plan = json.loads(ricciq("export", folder, "--format", "float", "--dry-run", "--json").out)
    assert (Path(plan["path"]).name, plan["replaces"]) == ("model-float.onnx", False)
    pixels = ["--format", "float", "--input", "uint8", "--batch", "1", "--dry-run", "--json"]
    plan = json.loads(ricciq("export", folder, *pixels).out)
    assert (Path(plan["path"]).name, plan["batch"]) == ("model-float-uint8-batch1.onnx", 1)
    refused = ricciq("export", folder, "--batch", "9999999", "--dry-run")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--batch 9999999 is not a batch of images of (1, 8, 8)" in refused.err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (folder / "best.safetensors").write_bytes(b"")
    assert ricciq("export", folder, "--dry-run").code == 3


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["quantize", "resnet5O", "--data", "digits"], "did you mean resnet50 or "),
        (["quantize", "ResNet-18", "--data", "digits"], "did you mean resnet18"),
        ([*QUANTIZE, "--method", "rici"], "did you mean ricci"),
        ([*QUANTIZE, "--method", "magic"], "should be 'ricci', 'ste'"),
        ([*QUANTIZE, "--recipe", "fashion-lo"], "did you mean fashion-low or"),
        (["compare", *QUANTIZE[1:], "--methods", "ste,projct", "--seeds", "2"], "mean project"),
        (["compare", *QUANTIZE[1:], "--methods", "ste,ricci:flow=linea", "--seeds", "2"], "linear"),
        (["recipes", "show", "resnet50-w2"], "did you mean resnet50-w2a2"),
    ],
)
def test_a_name_that_is_nearly_right_gets_the_right_one(words, remedy):
    answer = ricciq(*words)
    assert answer.code in (2, 3)
    assert remedy in answer.err


def test_help_waits_for_nothing_heavy():
    code = """
import sys
from ricciq.cli import main
try:
    main(["compare", "--help"])
except SystemExit:
    heavy = {"torch", "timm", "numpy", "scipy", "onnx", "onnxruntime", "matplotlib", "psutil"}
    sys.exit(" ".join(heavy & sys.modules.keys()) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
