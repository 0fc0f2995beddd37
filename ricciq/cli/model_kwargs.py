"""The option --model-kwargs, as in timm: arguments of the model as ``key=value``."""

from __future__ import annotations

import ast
import json
from typing import Annotated, Any

import typer

from ricciq.cli.options import NumbersCommand
from ricciq.errors import UsageError

FLAG = "--model-kwargs"
ModelKwargs = Annotated[
    list[str] | None,
    typer.Option(
        FLAG,
        metavar="KEY=VALUE...",
        help="Arguments of timm's model, such as drop_path_rate=0.1 global_pool=max.",
    ),
]


class ModelCommand(NumbersCommand):
    """A command whose --model-kwargs takes several words, too, as in timm."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further word of its own, and parse the arguments.

        Args:
            ctx: of the command.
            args: as typed.
        """
        repeated: list[str] = []
        for word in args:
            if repeated[-2:-1] == [FLAG] and word.partition("=")[0].isidentifier() and "=" in word:
                repeated.append(FLAG)
            repeated.append(word)
        return super().parse_args(ctx, repeated)


def model_kwargs(pairs: list[str] | None) -> dict[str, Any] | None:
    """Parse --model-kwargs: values are Python literals, or else text, as in timm.

    Args:
        pairs: as typed, each ``key=value``.

    Returns:
        The arguments, as JSON has them; None if there are none.

    Raises:
        UsageError: one of them has another form.
    """
    kwargs: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not (equals and key.isidentifier()):
            raise UsageError(f"{FLAG} {pair} is no argument; give key=value, as in global_pool=max")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = text
        try:
            kwargs[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise UsageError(
                f"{FLAG} {pair} has a value that a recipe cannot hold; give numbers, text or lists"
            ) from None
    return kwargs or None
