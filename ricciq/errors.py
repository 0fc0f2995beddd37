"""The errors a user can meet, and the exit code each one ends with.

    RicciqError                1   failed while running
    ├── UsageError             2   wrong flags or flag values
    │   ├── RecipeError        2   an invalid recipe
    │   └── FolderTakenError   2   the folder of a run has another run
    ├── InputError             3   an input is missing, unreadable, unsafe or does not fit
    │   ├── DataError          3   the images
    │   ├── CheckpointError    3   the weights
    │   └── ModelError         3   the model name, or an ONNX file
    ├── DivergedError          1   gradients or predictions are NaN or infinite
    ├── GateError              4   accuracy or agreement is below a gate
    └── InterruptedRunError  130   stopped by the user; --resume continues the run

Every message is one sentence that names the thing, the value and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RicciqError(Exception):
    """An error that ends a ricciq command without a traceback.

    Attributes:
        exit_code: of the command.
        said: whether another process that raised the same error prints it.
    """

    exit_code = 1
    said = False


class UsageError(RicciqError):
    """A command was called with invalid values."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe file is missing, is not valid YAML, or has invalid values."""


class FolderTakenError(UsageError):
    """The folder of a run has another run, or another process uses it."""


class InputError(RicciqError):
    """An input is missing, unreadable, unsafe or does not fit."""

    exit_code = 3


class DataError(InputError):
    """A data set is missing, unreadable or lacks a split."""


class CheckpointError(InputError):
    """A checkpoint is missing, unreadable, unsafe or of another model."""


class ModelError(InputError):
    """A model name is unknown, or a model file cannot be used."""


class DivergedError(RicciqError):
    """Gradients in training, or the predictions of a model, are NaN or infinite."""


class GateError(RicciqError):
    """A measured accuracy or agreement is below the gate that the caller set."""

    exit_code = 4


class InterruptedRunError(RicciqError):
    """The user stopped a run; its last saved state is intact."""

    exit_code = 130


def on_one_line(error: object, most: int | None = None) -> str:
    """The message of a library's error on one line, for use within a sentence.

    Args:
        error: the error.
        most: the largest number of characters to keep; None keeps all.
    """
    return " ".join(str(error).split())[:most]


_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "could not create a primitive",
    "STATUS_ALLOC_FAILED",
)
"""Parts of what torch and the libraries below it say where memory ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch means that memory ran out, on a GPU or a CPU."""
    # Known by its name, as this module must not import torch.
    names = {kind.__name__ for kind in type(error).__mro__}
    said = str(error)
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and any(part in said for part in _NO_MEMORY)
    )


def did_you_mean(given: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for an unknown name: the known names most like it, best first.

    Args:
        given: the unknown name.
        known: the known names, in lower case.
        otherwise: the remedy if no known name is similar.
    """
    near = difflib.get_close_matches(given.lower(), list(known), cutoff=0.5)
    return f"did you mean {' or '.join(near)}" if near else otherwise


def listed(values: Iterable[object]) -> str:
    """Values as a sentence lists what can be given."""
    *rest, last = map(str, values)
    return f"{', '.join(rest)} or {last}" if rest else last
