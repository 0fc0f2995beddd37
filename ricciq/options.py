"""Arguments and options of the verbs, under timm's names where timm has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DATA = "Folder with train/ and val/, torch/, wds/ or hfds/NAME, or digits."
Data = Annotated[str, typer.Option(help=DATA)]
MaybeData = Annotated[str | None, typer.Option(help=DATA)]
DATA_DIR = "Folder of torch/NAME or wds/NAME; cache of hfds/NAME."
DataDir = Annotated[Path | None, typer.Option(help=DATA_DIR)]
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
METHODS = "ricci, ste, ewgs, dsq, ede, lne or project"
WIDTHS = "1 to 8, ternary, or 32 for float"
Model = Annotated[str, typer.Argument(help="timm model name, or a float run's folder or file.")]
Bits = Annotated[str | None, typer.Option(help=f"Weights and activations: {WIDTHS}.")]
WeightBits = Annotated[str | None, typer.Option(help=f"Weights: {WIDTHS}.")]
ActBits = Annotated[str | None, typer.Option(help="Activations: 1 to 8, or 32.")]
RecipeName = Annotated[str | None, typer.Option(help="Shipped recipe's name, or a file.")]
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
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:0.")]
Amp = Annotated[bool | None, typer.Option(help="Mixed precision.")]
Compile = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="torch.compile the model.")
]
Output = Annotated[Path | None, typer.Option(help="Folder of the run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan, do nothing.")]
