"""The formats of `ricciq export`. Importing this imports none of their libraries.

To add a format, write a module with `apply` in this package and name it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

from ricciq.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Format:
    """A format: how --format names it, and the module that changes a deployed model to it.

    Attributes:
        name: what a user writes.
        module: the module of this package whose ``apply(deployed)`` makes a model of the format.
        help: a line about it.
        file: what its file is called in a run's folder.
    """

    name: str
    module: str
    help: str
    file: str

    def apply(self, deployed: nn.Module) -> nn.Module:
        """Change a deployed model, in place, so that its export is of this format.

        Args:
            deployed: as `ricciq.deploy.modules.deploy` made it.

        Returns:
            The same model, which computes the same numbers.
        """
        module = import_module(f"ricciq.deploy.formats.{self.module}")
        return cast("nn.Module", module.apply(deployed))


DEFAULT = Format("qdq", "qdq", "packed weights and integer kernels", "model.onnx")
"""What a run writes, and whose accuracy its report tells."""
FORMATS = (
    DEFAULT,
    Format(
        "float",
        "float_ops",
        "float operators that compute the same, for runtimes without integer ones",
        "model-float.onnx",
    ),
)


def find_format(name: str) -> Format:
    """The format of a name.

    Args:
        name: as given to --format.

    Returns:
        The entry of the catalogue.

    Raises:
        UsageError: there is none.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    names = [known.name for known in FORMATS]
    given = f"{', '.join(names[:-1])} or {names[-1]}"
    raise UsageError(f"--format {name} is not known; give {given}")


def format_help() -> str:
    """The help of --format: every name, and what it is."""
    return f"{'; '.join(f'{known.name}: {known.help}' for known in FORMATS)}."
