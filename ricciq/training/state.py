"""The progress of a run, and the state from which an interrupted run resumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ricciq.errors import CheckpointError
from ricciq.recipe import Count
from ricciq.runs.folder import RunFolder
from ricciq.system.journal import Journal
from ricciq.system.tensor_files import State, load_tensors
from ricciq.training.metrics import Tally


@dataclass
class TrainingState:
    """The progress of a run: what a state file stores beside the tensors.

    Attributes:
        epoch: finished epochs.
        steps: optimizer steps taken.
        images: images trained on in finished epochs.
        seconds: time spent on steps of finished epochs, before and after interruptions.
        skipped: steps skipped in finished epochs because gradients were not finite.
        bad_in_a_row: how many of the last steps were skipped in a row.
        best_top1: the highest hold-out top-1 of an epoch, percent.
        chosen_epoch: the epoch whose weights were kept, counted from 1; 0 before the first.
        chosen_top1: its hold-out top-1, percent.
        batch: batches used of the unfinished epoch.
        tally: sums over these batches; see `Tally`.
        geometry: of each layer at the unfinished epoch's last step, once it is taken.
        batch_size: images in a batch of one process.
        processes: how many train together; batches and steps are those of each.
        scaler: state of the loss scaler, empty unless training is in float16.
        stage: the stage of progressive quantization, see `ricciq.training.stages`.
    """

    # Validated where a state is read; a plain dataclass does not validate.
    __pydantic_config__ = ConfigDict(extra="forbid")

    epoch: Count = 0
    steps: Count = 0
    images: Count = 0
    seconds: float = 0.0
    skipped: Count = 0
    bad_in_a_row: Count = 0
    best_top1: float = 0.0
    chosen_epoch: Count = 0
    chosen_top1: float = 0.0
    batch: Count = 0
    tally: dict[str, int | float] = field(default_factory=dict)
    geometry: dict[str, dict[str, float]] = field(default_factory=dict)
    batch_size: Count = 0
    processes: Count = 1
    scaler: dict[str, Any] = field(default_factory=dict)
    stage: Count = 0

    @classmethod
    def of(cls, state: State) -> TrainingState:
        """The progress that a state file stores.

        Raises:
            CheckpointError: the file is damaged or of another version.
        """
        try:
            progress = TypeAdapter(cls).validate_python(state.metadata["progress"])
            Tally.from_dict(progress.tally)  # raises TypeError for an unknown name
        except (KeyError, TypeError, ValidationError):
            raise CheckpointError(
                f"{state.path} is damaged or from another version of ricciq; start again with "
                "--overwrite"
            ) from None
        return progress


def last_state(folder: RunFolder, journal: Journal) -> State | None:
    """The newest intact state of a run.

    Args:
        folder: of the run.
        journal: told if the last state is damaged and the one before is used.

    Returns:
        The state; None if the run has saved none yet.

    Raises:
        CheckpointError: there are states, but none of them is intact.
    """
    found = [path for path in (folder.last, folder.previous) if path.is_file()]
    if not found:
        return None
    try:
        return State(*load_tensors(found[0]), found[0])
    except CheckpointError as error:
        if len(found) == 1:
            raise
        journal.say(f"{error}; resuming from {folder.previous.name}")
    folder.previous.replace(folder.last)  # or the next save would keep the damaged one
    return State(*load_tensors(folder.last), folder.last)
