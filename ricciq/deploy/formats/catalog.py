"""The formats of `ricciq export`. Importing this module does not import torch.

To add a format, write a module with a function `apply` in this package and list it here.
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
    """An export format.

    Attributes:
        name: value of --format.
        module: module of this package whose ``apply(deployed)`` prepares a model for the format.
        help: a line about it.
        file: name of its file in a run's folder.
    """

    name: str
    module: str
    help: str
    file: str

    def apply(self, deployed: nn.Module) -> nn.Module:
        """Change a deployed model, in place, so that its export has this format.

        Args:
            deployed: from `ricciq.deploy.modules.deploy`.

        Returns:
            The same model, with the same outputs.
        """
        module = import_module(f"ricciq.deploy.formats.{self.module}")
        return cast("nn.Module", module.apply(deployed))


DEFAULT = Format("qdq", "qdq", "packed weights and integer kernels", "model.onnx")
"""The format that a run writes, and whose accuracy it reports."""
FORMATS = (
    DEFAULT,
    Format(
        "float",
        "float_ops",
        "float operators with the same results, for runtimes without integer ones",
        "model-float.onnx",
    ),
)


def find_format(name: str) -> Format:
    """Find a format by name.

    Args:
        name: as given to --format.

    Raises:
        UsageError: there is no such format.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    names = [known.name for known in FORMATS]
    given = f"{', '.join(names[:-1])} or {names[-1]}"
    raise UsageError(f"--format {name} is unknown; give {given}")


def format_help() -> str:
    """Help text of --format: the name of each format, and a line about it."""
    return f"{'; '.join(f'{known.name}: {known.help}' for known in FORMATS)}."
