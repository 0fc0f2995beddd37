"""Arguments and options of the verbs, under timm's names where timm has them."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from ricciq.cli import completion
from ricciq.cli.start import hushed
from ricciq.data.sources.catalog import data_help, root_help
from ricciq.deploy.formats import catalog as formats
from ricciq.errors import UsageError
from ricciq.estimators.catalog import named

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Data = Annotated[str, typer.Option(help=data_help())]
MaybeData = Annotated[str | None, typer.Option(help=data_help())]
DataDir = Annotated[Path | None, typer.Option(help=root_help())]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that load pictures.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Pictures in a batch.")]
TrainingBatchSize = Annotated[
    str | None,
    typer.Option("--batch-size", help="Pictures in a batch of a process; auto finds what fits."),
]
AccumulatedBatches = Annotated[
    int | None, typer.Option("--grad-accum-steps", help="Batches whose gradients make a step.")
]
GradCheckpointing = Annotated[
    bool | None,
    typer.Option("--grad-checkpointing", help="Recompute activations, to save memory."),
]
METHODS = named()
Method = Annotated[
    str | None,
    typer.Option(help=f"{METHODS}.", autocompletion=completion.one_of(completion.method_names)),
]
Methods = Annotated[
    str,
    typer.Option(
        help=f"Two or more of {METHODS}; changed as in ricci:block=9:time=0.05.",
        autocompletion=completion.some_of(completion.method_names),
    ),
]
WIDTHS = "1 to 8, ternary, 32 for float, or auto:2.5 for the best of that average"
_of_activations = completion.one_of(lambda: [*"12345678", "32"])
_of_weights = completion.one_of(lambda: [*"12345678", "32", "ternary"])
Model = Annotated[
    str,
    typer.Argument(
        help="timm model name, or a float run's folder or file.",
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
    str | None, typer.Option(help="Find the bits of layers for a file this large, as 4MB.")
]
RECIPE = "Shipped recipe's name, or a file."
of_recipes = completion.one_of(completion.recipe_names)
RecipeName = Annotated[str | None, typer.Option(help=RECIPE, autocompletion=of_recipes)]
Checkpoint = Annotated[Path | None, typer.Option(help="Float weights to start from.")]
AutoAugment = Annotated[
    str | None, typer.Option("--aa", help="timm's policy of augmentation, as rand-m7-mstd0.5.")
]
Mixup = Annotated[float | None, typer.Option(help="Alpha of Mixup, which blends pictures.")]
CutMix = Annotated[float | None, typer.Option("--cutmix", help="Alpha of CutMix, which pastes.")]
Reprob = Annotated[float | None, typer.Option(help="Probability of erasing a rectangle.")]
Epochs = Annotated[int | None, typer.Option(help="0 calibrates without training.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate.")]
Seed = Annotated[int | None, typer.Option(help="Start of everything random.")]
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
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run.")]
Offline = Annotated[
    bool, typer.Option("--offline", help="Use what is on this machine, never the network.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan, do nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", callback=hushed, help="Say nothing but errors.")]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help=formats.format_help(),
        autocompletion=completion.one_of(lambda: [known.name for known in formats.FORMATS]),
    ),
]
Split = Annotated[
    str,
    typer.Option(
        help="Judge by val, or by holdout to choose a method.",
        autocompletion=completion.one_of(lambda: ["val", "holdout"]),
    ),
]


def widths(
    bits: str | None,
    weight_bits: str | None,
    act_bits: str | None,
    max_bytes: str | None,
    messages: list[str],
) -> dict[str, Any]:
    """The keys under `quantization` that the flags about widths ask for.

    Args:
        bits: of weights and activations, as typed.
        weight_bits: goes before it.
        act_bits: goes before it.
        max_bytes: a budget in the place of widths of weights.
        messages: receives what is to be said about them.

    Raises:
        UsageError: one of them is no width, or they contradict each other.
    """
    both, weights = _width("--bits", bits), _width("--weight-bits", weight_bits)
    activations = both
    if both in (1, "ternary") or isinstance(both, float):
        activations = 2 if not isinstance(both, float) else math.ceil(both)
        if act_bits is None:
            messages.append(
                f"--bits {bits} sets the weights; activations get {activations} bits, unless "
                "--act-bits says so"
            )
    weights = both if weights is None else weights
    if weights is not None and max_bytes is not None:
        raise UsageError(f"--max-bytes {max_bytes} finds the bits itself; leave out those given")
    asked: dict[str, Any] = {}
    if weights is not None or max_bytes is not None:
        average = weights if isinstance(weights, float) else None
        found = average is not None or max_bytes is not None
        asked = {"average_bits": average, "max_bytes": max_bytes}
        asked["weight_bits"] = "auto" if found else weights
    activations = _width("--act-bits", act_bits, weights=False) or activations
    return asked if activations is None else {**asked, "act_bits": activations}


def _width(flag: str, text: str | None, weights: bool = True) -> int | float | str | None:
    """A width; of weights also "ternary", or as a fraction the average that auto: asks for."""
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
    """A whole number from 0 on, of no more digits than Python reads at once."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def training_batch_size(text: str | None) -> int | str | None:
    """The number of pictures, or "auto".

    Raises:
        UsageError: it is neither.
    """
    if text is None or text == "auto":
        return text
    if size := _whole(text):
        return size
    raise UsageError(f"--batch-size {text} is no number of pictures; give one from 1, or auto")
