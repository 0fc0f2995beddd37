"""Arguments and options of the commands, named as in timm where timm has them."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from typer.core import TyperCommand

from ricciq.cli import completion
from ricciq.cli.start import silence
from ricciq.data.preprocessing import LARGEST_SIDE, InputType, Interpolation
from ricciq.data.sources.catalog import EvaluationSplit, data_help, root_help
from ricciq.deploy.formats import catalog as formats
from ricciq.errors import UsageError, listed
from ricciq.estimators.catalog import named


class NumbersCommand(TyperCommand):
    """A command whose options take several numbers as in timm, too: ``--mean 0.5 0.5 0.5``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join the numbers that follow an option by commas, and parse the arguments.

        Args:
            ctx: of the command.
            args: as typed.
        """
        joined: list[str] = []
        for word in args:
            of_option = len(joined) > 1 and joined[-2] in _OF_NUMBERS
            if of_option and _NUMBERS.fullmatch(word) and joined[-1].count(",") < 2:
                joined[-1] += f",{word}"
            else:
                joined.append(word)
        return super().parse_args(ctx, joined)


_OF_NUMBERS = {"--input-size", "--mean", "--std"}
_NUMBERS = re.compile(r"[0-9.,]+")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Data = Annotated[str, typer.Option(help=data_help())]
MaybeData = Annotated[str | None, typer.Option(help=data_help())]
DataDir = Annotated[Path | None, typer.Option(help=root_help())]
ClassMap = Annotated[
    Path | None,
    typer.Option(
        help="Text file with the names of the model's outputs in their order, as in timm."
    ),
]
InputSize = Annotated[
    str | None, typer.Option(help="Height and width in pixels, such as 224 or 3,224,224.")
]
Mean = Annotated[
    str | None, typer.Option(help="Mean of each channel, of pixels from 0 to 1: 0.5,0.5,0.5.")
]
Std = Annotated[str | None, typer.Option(help="Standard deviation of each channel.")]
CropPct = Annotated[
    float | None,
    typer.Option("--crop-pct", help="Share of the resized image that the crop keeps."),
]
ResizeMethod = Annotated[
    str | None,
    typer.Option("--interpolation", help=f"Method of resizing: {listed(get_args(Interpolation))}."),
]
Like = Annotated[
    Path | None,
    typer.Option(help="Run or file of ricciq with the same preprocessing and classes."),
]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that load images.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images in a batch.")]
TrainingBatchSize = Annotated[
    str | None,
    typer.Option("--batch-size", help="Images in a batch of a process; auto finds what fits."),
]
AccumulatedBatches = Annotated[
    int | None, typer.Option("--grad-accum-steps", help="Batches per optimizer step.")
]
GradCheckpointing = Annotated[
    bool | None,
    typer.Option("--grad-checkpointing", help="Recompute activations to save memory."),
]
METHODS = named()
Method = Annotated[
    str | None,
    typer.Option(help=f"{METHODS}.", autocompletion=completion.one_of(completion.method_names)),
]
Methods = Annotated[
    str,
    typer.Option(
        help=f"Two or more of {METHODS}; with settings, as in ricci:time=0.5:trust=0.1.",
        autocompletion=completion.some_of(completion.method_names),
    ),
]
WIDTHS = "1 to 8, ternary, 32 for float, or auto:2.5 to find the best with that average"
_of_activations = completion.one_of(lambda: [*"12345678", "32"])
_of_weights = completion.one_of(lambda: [*"12345678", "32", "ternary"])
Model = Annotated[
    str,
    typer.Argument(
        help="timm model name, float run, folder as timm writes it, or hf-hub:OWNER/NAME.",
        autocompletion=completion.one_of(completion.model_names),
    ),
]
Bits = Annotated[
    str | None,
    typer.Option(help=f"Weights and activations: {WIDTHS}.", autocompletion=_of_weights),
]
WeightBits = Annotated[
    str | None, typer.Option(help=f"Weights: {WIDTHS}.", autocompletion=_of_weights)
]
ActBits = Annotated[
    str | None, typer.Option(help="Activations: 1 to 8, or 32.", autocompletion=_of_activations)
]
MaxBytes = Annotated[
    str | None,
    typer.Option(help="Find the bits of each layer for a file of this size, such as 4MB."),
]
RECIPE = "Name of a shipped recipe, or a file."
of_recipes = completion.one_of(completion.recipe_names)
RecipeName = Annotated[str | None, typer.Option(help=RECIPE, autocompletion=of_recipes)]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Float weights: a file, a folder as timm writes it, or hf-hub:OWNER/NAME."),
]
AutoAugment = Annotated[
    str | None, typer.Option("--aa", help="timm's augmentation policy, such as rand-m7-mstd0.5.")
]
Mixup = Annotated[float | None, typer.Option(help="Alpha of Mixup, which blends images.")]
CutMix = Annotated[
    float | None, typer.Option("--cutmix", help="Alpha of CutMix, which pastes parts.")
]
Reprob = Annotated[float | None, typer.Option(help="Probability of erasing a rectangle.")]
Epochs = Annotated[int | None, typer.Option(help="Epochs of training; 0 for none.")]
FloatEpochs = Annotated[
    int | None, typer.Option(help="Epochs of the float model before that, if its head is new.")
]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate.")]
Seed = Annotated[int | None, typer.Option(help="Seed of all random numbers.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="auto, cpu, cuda or cuda:0.",
        autocompletion=completion.one_of(lambda: ["auto", "cpu", "cuda"]),
    ),
]
Amp = Annotated[bool | None, typer.Option(help="Mixed precision.")]
Compile = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="torch.compile the model.")
]
Output = Annotated[Path | None, typer.Option(help="Folder of the run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
Probe = Annotated[
    bool, typer.Option("--probe", help="With --dry-run: time 20 steps, and say how long it takes.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan, and write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", callback=silence, help="Print errors only.")]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help=formats.format_help(),
        autocompletion=completion.one_of(lambda: [known.name for known in formats.FORMATS]),
    ),
]
_INPUTS = get_args(InputType)
Input = Annotated[
    str,
    typer.Option(
        "--input",
        help="float: normalized images, (N, C, H, W); uint8: pixels, (N, H, W, C).",
        autocompletion=completion.one_of(lambda: _INPUTS),
    ),
]
Split = Annotated[
    str,
    typer.Option(
        help="Images to judge by: val, or holdout to choose a method.",
        autocompletion=completion.one_of(lambda: ["val", "holdout"]),
    ),
]

_SPLITS = get_args(EvaluationSplit)
EvaluatedSplit = Annotated[
    str,
    typer.Option(
        "--split",
        help="Images to measure on: val, or test.",
        autocompletion=completion.one_of(lambda: _SPLITS),
    ),
]


def widths(
    bits: str | None,
    weight_bits: str | None,
    act_bits: str | None,
    max_bytes: str | None,
    messages: list[str],
) -> dict[str, Any]:
    """Turn the options about widths into keys of a recipe's `quantization` section.

    Args:
        bits: width of weights and activations, as typed.
        weight_bits: width of weights; overrides `bits`.
        act_bits: width of activations; overrides `bits`.
        max_bytes: a budget instead of a width of weights.
        messages: receives messages for the user.

    Raises:
        UsageError: one of them is not a width, or they contradict each other.
    """
    both, weights = _width("--bits", bits), _width("--weight-bits", weight_bits)
    activations = both
    if both in (1, "ternary") or isinstance(both, float):
        activations = 2 if not isinstance(both, float) else math.ceil(both)
        if act_bits is None:
            messages.append(
                f"--bits {bits} sets the weights; activations get {activations} bits unless "
                "--act-bits is given"
            )
    weights = both if weights is None else weights
    if weights is not None and max_bytes is not None:
        raise UsageError(
            f"--max-bytes {max_bytes} finds the bits of weights itself; leave out their bits"
        )
    asked: dict[str, Any] = {}
    if weights is not None or max_bytes is not None:
        average = weights if isinstance(weights, float) else None
        found = average is not None or max_bytes is not None
        asked = {"average_bits": average, "max_bytes": max_bytes}
        asked["weight_bits"] = "auto" if found else weights
    activations = _width("--act-bits", act_bits, weights=False) or activations
    return asked if activations is None else {**asked, "act_bits": activations}


def _width(flag: str, text: str | None, weights: bool = True) -> int | float | str | None:
    """Parse a width. For weights also "ternary", and auto:2.5 as the float 2.5."""
    if text is None or (weights and text == "ternary"):
        return text
    if (width := _whole(text)) in (*range(1, 9), 32):
        return width
    if weights and text.startswith("auto:"):
        with suppress(ValueError):
            if 1 <= (average := float(text.removeprefix("auto:"))) <= 8:
                return average
    allowed = WIDTHS if weights else "1 to 8, or 32 for float"
    raise UsageError(f"{flag} {text} is not a width; give {allowed}")


def _whole(text: str) -> int | None:
    """Parse a whole number of at most 19 digits: Python refuses to read very long ones."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def input_type(text: str) -> InputType:
    """Parse --input.

    Raises:
        UsageError: it is no type of input.
    """
    _check_known("--input", text, _INPUTS)
    return cast("InputType", text)


def evaluated_split(text: str) -> EvaluationSplit:
    """Parse --split of `eval`.

    Raises:
        UsageError: it is no split.
    """
    _check_known("--split", text, _SPLITS)
    return cast("EvaluationSplit", text)


def _check_known(flag: str, text: str, known: tuple[str, ...]) -> None:
    """Refuse a value of an option that is none of those known.

    Raises:
        UsageError: it is none.
    """
    if text not in known:
        raise UsageError(f"{flag} {text} is unknown; give {listed(known)}")


def preprocessing(
    input_size: str | None,
    mean: str | None,
    std: str | None,
    crop_pct: float | None,
    interpolation: str | None,
) -> dict[str, Any]:
    """Parse the options about preprocessing into keys of `Preprocessing`.

    Args:
        input_size: a side, height and width, or channels, height and width.
        mean: one number, or one for each channel.
        std: as `mean`.
        crop_pct: share that the crop keeps.
        interpolation: method of resizing.

    Returns:
        Those that are given; ``input_size`` is (height, width).

    Raises:
        UsageError: one of them is invalid.
    """
    found: dict[str, Any] = {"crop_pct": crop_pct, "interpolation": interpolation}
    found["input_size"] = input_size_of(input_size)
    for name, text in (("mean", mean), ("std", std)):
        if text is not None:
            channels = _numbers(f"--{name}", text, "a number for each channel, such as 0.5,0.5,0.5")
            if len(channels) == 2 or (name == "std" and min(channels) <= 0):
                raise UsageError(
                    f"--{name} {text} is no {name} of 1 or 3 channels; give 0.5,0.5,0.5"
                )
            found[name] = channels
    if crop_pct is not None and not 0.1 <= crop_pct <= 2:
        raise UsageError(f"--crop-pct {crop_pct} is not a share of the image; give 0.1 to 2")
    if interpolation is not None:
        _check_known("--interpolation", interpolation, get_args(Interpolation))
    return {key: value for key, value in found.items() if value is not None}


def input_size_of(text: str | None) -> tuple[int, int] | None:
    """Parse --input-size: a side, height and width, or channels, height and width.

    Returns:
        (height, width) in pixels.

    Raises:
        UsageError: it is no size.
    """
    if text is None:
        return None
    sides = _numbers("--input-size", text, "a size in pixels, such as 224 or 160,224")
    if not all(side.is_integer() and 1 <= side <= LARGEST_SIDE for side in sides):
        raise UsageError(f"--input-size {text} is not whole pixels; give 1 to {LARGEST_SIDE}")
    if len(sides) == 3 and sides[0] != 3:
        raise UsageError(
            f"--input-size {text} has other than 3 channels, which the weights decide; give height "
            "and width, and --model-kwargs in_chans=1 where weights are to be adapted"
        )
    return int(sides[-2:][0]), int(sides[-1])


def _numbers(flag: str, text: str, wanted: str) -> tuple[float, ...]:
    """Parse one to three numbers with commas or spaces between them."""
    with suppress(ValueError):
        numbers = tuple(float(part) for part in text.replace(",", " ").split())
        if 1 <= len(numbers) <= 3 and all(map(math.isfinite, numbers)):
            return numbers
    raise UsageError(f"{flag} {text} is invalid; give {wanted}")


def training_batch_size(text: str | None) -> int | str | None:
    """Parse --batch-size of training: a number of images, or "auto".

    Raises:
        UsageError: it is neither.
    """
    if text is None or text == "auto":
        return text
    if size := _whole(text):
        return size
    raise UsageError(f"--batch-size {text} is not a number of images; give 1 or more, or auto")
