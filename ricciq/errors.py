"""The errors a user can meet, and the exit code each one ends with.

    RicciqError                1   failed while running
    ├── UsageError             2   wrong flags or flag values
    │   └── RecipeError        2   a recipe that does not hold
    ├── InputError             3   something given is missing, unreadable, unsafe or does not fit
    │   ├── DataError          3   the pictures
    │   ├── CheckpointError    3   the weights
    │   └── ModelError         3   the model name, or an ONNX file
    ├── DivergedError          1   training, or what it led to, is not finite
    ├── GateError              4   an accuracy or agreement gate was not met
    └── InterruptedRunError  130   stopped by the user; --resume goes on

Every message is one sentence that names the thing, the value and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RicciqError(Exception):
    """Anything that ends a ricciq command without a traceback."""

    exit_code = 1
    said = False
    """Whether another process that met the same error says so."""


class UsageError(RicciqError):
    """A command was called with values that cannot work."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe file is missing, is not valid YAML, or holds values that cannot work."""


class InputError(RicciqError):
    """Something the user gave is missing, unreadable, unsafe or does not fit."""

    exit_code = 3


class DataError(InputError):
    """A data set is missing, unreadable or has no proper splits."""


class CheckpointError(InputError):
    """A checkpoint is missing, unreadable, unsafe or belongs to another model."""


class ModelError(InputError):
    """A model name is unknown, or a model file cannot be used."""


class DivergedError(RicciqError):
    """Training gave no finite gradients, or a model no finite answers."""


class GateError(RicciqError):
    """A measured accuracy or agreement is below what the caller demanded."""

    exit_code = 4


class InterruptedRunError(RicciqError):
    """The user stopped a run; its last saved state is intact."""

    exit_code = 130


def on_one_line(error: object, most: int | None = None) -> str:
    """What an error of a library says, as part of a sentence: so many letters of it, or all."""
    return " ".join(str(error).split())[:most]


def did_you_mean(given: str, known: Iterable[str], otherwise: str, most: int = 3) -> str:
    """The remedy for a name that is not known: those that are near to it, best first.

    Args:
        given: the name that somebody wrote.
        known: the names that there are, in small letters.
        otherwise: the remedy where none is near.
        most: how many to name.
    """
    near = difflib.get_close_matches(given.lower(), list(known), most, cutoff=0.5)
    return f"did you mean {' or '.join(near)}" if near else otherwise
