"""How far a run has come, and the newest state that it goes on from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ricciq.errors import CheckpointError
from ricciq.recipe import Count
from ricciq.runs.folder import RunFolder
from ricciq.system.journal import Journal
from ricciq.system.tensor_files import (
    State,
    load_tensors,
)
from ricciq.training.metrics import Tally


@dataclass
class Progressed:
    """How far a run has come; what the state file remembers beside the tensors.

    Attributes:
        epoch: epochs finished.
        steps: optimizer steps taken.
        images: pictures trained on in finished epochs.
        seconds: time spent on steps of finished epochs, over all sittings.
        skipped: steps skipped in finished epochs because gradients were not finite.
        bad_in_a_row: the last steps that were.
        best_top1: the highest hold-out top-1 of an epoch, percent.
        chosen_epoch: the epoch whose weights were kept, counted from 1; 0 before the first.
        chosen_top1: its hold-out top-1, percent.
        batch: batches of the unfinished epoch that were used.
        tally: sums over them; see `Tally`.
        geometry: of each layer at the unfinished epoch's last step, once that is done.
        batch_size: pictures in a batch of one process.
        processes: how many train together; batches and steps are counted by it.
        scaler: state of the loss scaler, empty unless training in float16.
        stage: which of the stages of falling widths the steps are of.
    """

    # Checked where a state is read; a plain dataclass does not check.
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
    def of(cls, state: State) -> Progressed:
        """What a state says.

        Raises:
            CheckpointError: it is no state of this version's.
        """
        try:
            done = TypeAdapter(cls).validate_python(state.metadata["progress"])
            Tally.from_dict(done.tally)  # has sums of its own names only
        except (KeyError, TypeError, ValidationError):
            raise CheckpointError(
                f"{state.path} is damaged, or the state of another version of ricciq; start again "
                "with --overwrite"
            ) from None
        return done


def last_state(folder: RunFolder, journal: Journal) -> State | None:
    """The newest state of a run that is intact; None if it has none yet.

    Raises:
        CheckpointError: there are states, and none of them is intact.
    """
    there = [path for path in (folder.last, folder.previous) if path.is_file()]
    if not there:
        return None
    try:
        return State(*load_tensors(there[0]), there[0])
    except CheckpointError as error:
        if len(there) == 1:
            raise
        journal.say(f"{error}; going on from {folder.previous.name}")
    folder.previous.replace(folder.last)  # or the next save would keep the damaged one instead
    return State(*load_tensors(folder.last), folder.last)
