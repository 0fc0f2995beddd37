"""The command line: exit codes, one sentence on stderr, one JSON object on stdout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import numpy as np
import pytest
import torch
from command import Answer
from PIL import Image

from ricciq import __version__
from ricciq.deploy.session import open_session, session_metadata
from ricciq.recipe import Recipe
from ricciq.system.tensor_files import save_tensors
from ricciq.workflows import quantize as pipeline
from ricciq.workflows.session import Session

QUANTIZE = ["quantize", "digits_resnet8", "--data", "digits"]


@pytest.fixture
def ricciq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Run a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return command.ricciq


def check_refusal(answer: Answer, code: int, *words: str) -> None:
    """One sentence with these words, and nothing else."""
    assert answer.code == code
    assert answer.out == ""
    last = answer.err.strip().splitlines()[-1]
    assert last.startswith("ricciq: ")
    assert "Traceback" not in answer.err
    for word in words:
        assert word in last


@pytest.mark.parametrize("bits", ["0", "9", "-1", "two", "16", "2.0"])
def test_widths_that_do_not_exist(ricciq: Callable[..., Answer], bits: str) -> None:
    check_refusal(ricciq(*QUANTIZE, f"--bits={bits}"), 2, "--bits", bits, "1 to 8")


def test_activations_cannot_be_ternary(ricciq: Callable[..., Answer]) -> None:
    check_refusal(ricciq(*QUANTIZE, "--act-bits", "ternary"), 2, "--act-bits", "ternary")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], ["frobnicate"]),
        (["quantize"], ["model"]),
        (["quantize", "digits_resnet8"], ["--data"]),
        ([*QUANTIZE, "--epochs", "many"], ["--epochs"]),
        ([*QUANTIZE, "--epochs", "-1"], ["training.epochs", "-1"]),
        ([*QUANTIZE, "--lr", "0"], ["training.lr"]),
        ([*QUANTIZE, "--method", "magic"], ["method.name", "magic", "ricci"]),
        ([*QUANTIZE, "--device", "tpu"], ["device", "tpu"]),
        ([*QUANTIZE, "--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        ([*QUANTIZE, "--recipe", "digits-flaot"], ["digits-flaot", "digits-float"]),
        ([*QUANTIZE, "--resume"], ["--resume"]),
        (["eval", "model.onnx", "--data", "digits", "--min-agreement", "99"], ["--reference"]),
        (["export", "run", "--format", "int3"], ["--format", "int3"]),
        (["export", "run", "--input", "unit8"], ["--input", "unit8", "float or uint8"]),
        (["export", "run", "--batch", "0"], ["--batch"]),
    ],
)
def test_wrong_usage_exits_2(
    ricciq: Callable[..., Answer], arguments: list[str], words: list[str]
) -> None:
    check_refusal(ricciq(*arguments), 2, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", "digits_resnet", "--data", "digits"], ["digits_resnet", "digits_resnet8"]),
        (["quantize", "digits_resnet8", "--data", "no/such/folder"], ["no/such/folder"]),
        ([*QUANTIZE, "--checkpoint", "none.safetensors"], ["none.safetensors"]),
        (["quantize", "cifar_resnet20", "--data", "digits"], ["cifar_resnet20", "--checkpoint"]),
        (["eval", "none.onnx", "--data", "digits"], ["none.onnx"]),
        (["inspect", "none.onnx"], ["none.onnx"]),
        (["bench", "none.onnx"], ["none.onnx"]),
        (["export", "none"], ["none"]),
    ],
)
def test_missing_things_exit_3_and_leave_nothing(
    ricciq: Callable[..., Answer], tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    check_refusal(ricciq(*arguments), 3, *words)
    assert list(tmp_path.iterdir()) == []


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def test_a_pickle_payload_is_refused_and_not_run(
    ricciq: Callable[..., Answer], tmp_path: Path
) -> None:
    torch.save({"state_dict": Payload(tmp_path / "touched")}, tmp_path / "evil.pth")
    check_refusal(ricciq(*QUANTIZE, "--checkpoint", "evil.pth"), 3, "evil.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pth"]


@pytest.mark.parametrize("name", ["text.safetensors", "text.pth", "text.onnx"])
def test_files_that_are_something_else(
    ricciq: Callable[..., Answer], tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("not what its name says")
    if name.endswith(".onnx"):
        check_refusal(ricciq("inspect", name), 3, name)
        check_refusal(ricciq("eval", name, "--data", "digits"), 3, name)
    else:
        check_refusal(ricciq(*QUANTIZE, "--checkpoint", name), 3, name)
        check_refusal(ricciq("eval", name, "--data", "digits"), 3, name)


def test_a_checkpoint_without_metadata_of_its_model(
    ricciq: Callable[..., Answer], tmp_path: Path
) -> None:
    save_tensors(tmp_path / "bare.safetensors", {"x": torch.zeros(1)}, {})
    check_refusal(ricciq("export", "bare.safetensors"), 3, "bare.safetensors")
    check_refusal(ricciq("quantize", "bare.safetensors", "--data", "digits"), 3, "bare.safetensors")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of eight grey images each, in train/ and val/."""
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for number, label in enumerate(("dark", "light")):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(8):
                pixels = random.integers(100 * number, 100 * number + 100, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_a_truncated_validation_image_is_named_before_anything_is_written(
    ricciq: Callable[..., Answer], image_folder: Path, tmp_path: Path
) -> None:
    broken = image_folder / "val" / "light" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    answer = ricciq("quantize", "digits_resnet8", "--data", image_folder, "--output", "run")
    check_refusal(answer, 3, str(broken))
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


def test_an_empty_class_folder_is_named(ricciq: Callable[..., Answer], image_folder: Path) -> None:
    for image in (image_folder / "train" / "light").iterdir():
        image.unlink()
    answer = ricciq("quantize", "digits_resnet8", "--data", image_folder)
    check_refusal(answer, 3, "light")


def test_a_folder_without_validation_images(
    ricciq: Callable[..., Answer], image_folder: Path
) -> None:
    (image_folder / "val").rename(image_folder / "other")
    answer = ricciq("quantize", "digits_resnet8", "--data", image_folder)
    check_refusal(answer, 3, "val")


def test_an_output_folder_that_is_not_a_run(ricciq: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for flag in ([], ["--overwrite"], ["--resume"]):
        check_refusal(ricciq(*QUANTIZE, "--output", "mine", *flag), 2, "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    ricciq: Callable[..., Answer], tmp_path: Path
) -> None:
    answer = ricciq(*QUANTIZE, "--bits", "3", "--epochs", "4", "--dry-run", "--json")
    plan = json.loads(answer.out)
    assert answer.code == 0
    assert [row["weight_bits"] for row in plan["layers"]] == [8, *[3] * 8, 8]
    assert plan["epochs"] == 4
    assert plan["steps"] == 4 * (1365 // 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("bits", "weights"), [("1", 1), ("ternary", "ternary")])
def test_one_bit_and_ternary_leave_activations_at_two_bits_and_say_so(
    ricciq: Callable[..., Answer], bits: str, weights: int | str
) -> None:
    answer = ricciq(*QUANTIZE, "--bits", bits, "--dry-run", "--json")
    recipe = json.loads(answer.out)["recipe"]["quantization"]
    assert (recipe["weight_bits"], recipe["act_bits"]) == (weights, 2)
    assert "--act-bits" in answer.err
    asked = ricciq(*QUANTIZE, "--bits", bits, "--act-bits", "1", "--dry-run", "--json")
    assert json.loads(asked.out)["recipe"]["quantization"]["act_bits"] == 1


def test_flags_override_the_recipe_and_the_recipe_overrides_the_defaults(
    ricciq: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(
        "quantization: {weight_bits: 3, act_bits: 5}\ntraining: {epochs: 7}\n"
    )
    answer = ricciq(*QUANTIZE, "--recipe", "mine.yaml", "--epochs", "2", "--dry-run", "--json")
    recipe = json.loads(answer.out)["recipe"]
    assert recipe["quantization"]["weight_bits"] == 3
    assert recipe["training"]["epochs"] == 2
    assert recipe["quantization"]["edge_bits"] == 8


def test_flags_of_augmentation_have_the_names_of_timm(ricciq: Callable[..., Answer]) -> None:
    flags = ["--aa", "rand-m7", "--mixup", "0.2", "--cutmix", "1", "--reprob", "0.3"]
    answer = ricciq(*QUANTIZE, *flags, "--dry-run", "--json")
    found = json.loads(answer.out)["recipe"]["data"]["augmentation"]
    assert (found["auto_augment"], found["mixup"], found["cutmix"]) == ("rand-m7", 0.2, 1.0)
    assert (found["reprob"], found["pad_crop"]) == (0.3, 0)


def test_arguments_of_the_model_are_given_as_in_timm(
    ricciq: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("model: {kwargs: {global_pool: avg, drop_rate: 0.1}}")
    flags = ["--model-kwargs", "drop_path_rate=0.1", "global_pool=max", "--recipe", "mine.yaml"]
    flags += ["--model-kwargs", "channels=(32, 48, 48, 96)", "--input-size", "3,160,224"]
    answer = ricciq(
        "quantize", "test_resnet", "--data", "digits", *flags, "--dry-run", "--json", "--offline"
    )
    recipe = json.loads(answer.out)["recipe"]
    assert recipe["model"]["kwargs"] == {
        "global_pool": "max",
        "drop_rate": 0.1,
        "drop_path_rate": 0.1,
        "channels": [32, 48, 48, 96],
    }
    assert recipe["data"]["input_size"] == [160, 224]
    answer = ricciq("quantize", "test_resnet", "--data", "digits", "--input-size", "1,32,32")
    assert answer.code == 2
    assert "--input-size 1,32,32 has other than 3 channels" in answer.err


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["global_pool"], 2, "--model-kwargs global_pool is no argument; give key=value"),
        (["x={1,2}"], 2, "has a value that a recipe cannot hold"),
        (["num_classes=3"], 3, "num_classes cannot be set, since ricciq decides it"),
        (["checkpoint_path=x.pth"], 3, "checkpoint_path cannot be set"),
        (["pretrained_cfg={'file': 'x'}"], 3, "pretrained_cfg cannot be set"),
        (["in_chans=4"], 3, "in_chans 4"),
        (["img_size=big"], 3, "img_size 'big' is no size"),
        (["colour=red"], 3, "cannot build model"),
    ],
)
def test_arguments_that_no_model_takes_are_refused(
    ricciq: Callable[..., Answer], words: list[str], code: int, sentence: str
) -> None:
    check_refusal(ricciq(*QUANTIZE, "--model-kwargs", *words), code, sentence)


def test_help_and_the_module_do_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from ricciq.cli import main\n"
        "try:\n    main(['quantize', '--help'])\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "sys.exit(code or (7 if 'torch' in sys.modules else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--act-bits" in done.stdout


def test_debug_shows_the_traceback() -> None:
    command = [sys.executable, "-m", "ricciq", "--debug", "inspect", "none.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "x.onnx", "--data", "digits", "--batch-size", "-3"], ["--batch-size"]),
        (["eval", "x.onnx", "--data", "digits", "--workers", "-1"], ["--workers"]),
        ([*QUANTIZE, "--weight-bits", "32", "--act-bits", "4"], ["4-bit activations"]),
        ([*QUANTIZE, "--recipe", "wild.yaml"], ["hflip", "5"]),
    ],
)
def test_values_out_of_range_exit_2(
    ricciq: Callable[..., Answer], tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "wild.yaml").write_text("data: {augmentation: {hflip: 5}}\n")
    check_refusal(ricciq(*arguments), 2, *words)


def test_calibration_sees_every_class_of_a_sorted_folder(image_folder: Path) -> None:
    values = {
        "model": {"name": "digits_resnet8", "pretrained": False},
        "data": {"name": str(image_folder), "batch_size": 4, "calibration_batches": 1},
    }
    job = pipeline.prepare(Recipe.from_values(values), Session(torch.device("cpu")))
    (seen,) = job.calibration_images()
    brightness = sorted(float(image.mean()) for image in seen)
    assert brightness[-1] - brightness[0] > 0.5  # the two classes lie 100 of 255 apart


@pytest.mark.slow
def test_a_run_does_not_overwrite_the_weights_it_starts_from(
    ricciq: Callable[..., Answer], tmp_path: Path
) -> None:
    float_run = ["--bits", "32", "--epochs", "0", "--output", "base"]
    assert ricciq(*QUANTIZE, *float_run).code == 0
    before = (tmp_path / "base" / "best.safetensors").read_bytes()
    words = ["quantize", "base", "--data", "digits", "--output", "base", "--overwrite"]
    check_refusal(ricciq(*words), 2, "base")
    assert (tmp_path / "base" / "best.safetensors").read_bytes() == before


def stored_in(path: Path) -> dict[str, Any]:
    return session_metadata(open_session(path), path)


def test_a_file_has_the_metadata_that_a_deployer_needs(finished_run: Path) -> None:
    report = json.loads((finished_run / "report.json").read_text())
    stored = stored_in(finished_run / "model.onnx")
    assert stored["ricciq"] == __version__
    assert stored["bits"] == {"weights": 2, "activations": 2}
    assert stored["class_names"] == [str(number) for number in range(10)]
    assert stored["recipe"]["model"]["name"] == "digits_resnet8"
    assert stored["preprocessing"].keys() == {
        "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"
    }  # fmt: skip
    assert stored["accuracy"] == {
        key: report["onnx"][key] for key in ("top1", "top5", "loss", "samples")
    }
    assert stored["accuracy"]["samples"] == 360
    assert report["size"]["onnx_bytes"] == (finished_run / "model.onnx").stat().st_size
    assert report["size"]["float_bytes"] == (finished_run / "float.onnx").stat().st_size
    of_float = stored_in(finished_run / "float.onnx")
    assert of_float["bits"] == {"weights": 32, "activations": 32}
    assert "accuracy" not in of_float  # onnxruntime has not measured it


@pytest.mark.slow
def test_export_carries_the_accuracy_along(
    ricciq: Callable[..., Answer], finished_run: Path, tmp_path: Path
) -> None:
    assert ricciq("export", finished_run / "best.safetensors", "--output", "again.onnx").code == 0
    assert (tmp_path / "again.onnx").read_bytes() == (finished_run / "model.onnx").read_bytes()
    (tmp_path / "alone.safetensors").write_bytes((finished_run / "best.safetensors").read_bytes())
    check_refusal(
        ricciq("export", "alone.safetensors"), 2, "is not in the folder of a run; give --output"
    )
    assert ricciq("export", "alone.safetensors", "--output", "alone.onnx").code == 0
    assert "accuracy" not in stored_in(tmp_path / "alone.onnx")
    shutil.copytree(finished_run, tmp_path / "copy")
    (tmp_path / "copy" / "report.json").write_text("{}")
    check_refusal(ricciq("export", "copy", "--output", "x.onnx"), 3, "report.json")
    assert not (tmp_path / "x.onnx").exists()


def test_inspect_shows_the_metadata_of_a_file(
    ricciq: Callable[..., Answer], finished_run: Path
) -> None:
    shown = json.loads(ricciq("inspect", finished_run / "model.onnx", "--json").out)
    assert shown["metadata"] == stored_in(finished_run / "model.onnx")
    answer = ricciq("inspect", finished_run / "model.onnx")
    top1 = shown["metadata"]["accuracy"]["top1"]
    for words in (__version__, "weights 2; activations 2", f"top1 {top1:.4g}", "input_size 1, 8"):
        assert words in answer.out


def test_an_invalid_recipe_removes_nothing(
    ricciq: Callable[..., Answer], finished_run: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(finished_run, tmp_path / "copy")
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("method: {name: dsq, rho: 0.5}")
    arguments = ["quantize", "digits_resnet8", "--data", "digits", "--recipe", recipe]
    refused = ricciq(*arguments, "--output", copied, "--overwrite")
    check_refusal(refused, 2, "method dsq has no rho")
    assert (copied / "model.onnx").read_bytes() == (finished_run / "model.onnx").read_bytes()
    # The values of a recipe's method are not those of another.
    assert ricciq(*arguments, "--method", "ste", "--dry-run").code == 0


@pytest.mark.parametrize("gate", ["nan", "inf"])
def test_a_minimum_accuracy_is_a_number(
    ricciq: Callable[..., Answer], finished_run: Path, gate: str
) -> None:
    answer = ricciq("eval", finished_run / "model.onnx", "--data", "digits", f"--min-top1={gate}")
    check_refusal(answer, 2, "--min-top1", "is not a percentage")
