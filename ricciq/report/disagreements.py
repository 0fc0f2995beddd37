"""Validation pictures that the float model and the written file answer differently, as examples."""

from __future__ import annotations

import base64
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from ricciq.errors import InputError, on_one_line
from ricciq.system.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image

    from ricciq.evaluation import Predictions

SHOWN = 12
THUMBNAIL = 112
"""Pixels of the longer side; a page shows them no larger."""


class Disagreement(BaseModel):
    """A picture two models answer differently.

    Attributes:
        index: the picture's place among the validation pictures.
        label: the name of its class; None where pictures have no labels.
        float_guess: what the float model takes it for.
        float_share: how sure it is, percent.
        onnx_guess: what the file takes it for.
        onnx_share: how sure it is, percent.
        png: the picture, made small, as a PNG in base64.
    """

    index: int
    label: str | None
    float_guess: str
    float_share: float
    onnx_guess: str
    onnx_share: float
    png: str


class Disagreements(BaseModel):
    """How many such pictures there are, and some of them."""

    count: int
    examples: list[Disagreement]

    def save(self, path: Path) -> None:
        """Write the file that `load` reads."""
        write_atomically(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Disagreements:
        """What `save` wrote; none if the file does not exist.

        Raises:
            InputError: the file is damaged.
        """
        if not path.is_file():
            return cls(count=0, examples=[])
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = on_one_line(error, 160)
            raise InputError(
                f"{path} holds no examples of a run ({reason}); remove it, and the page goes "
                "without them"
            ) from None


def find_disagreements(
    in_float: Predictions,
    in_onnx: Predictions,
    labels: list[str | None],
    names: list[str],
    picture: Callable[[int], Image.Image],
) -> Disagreements:
    """Where two models differ, with those pictures as examples of which the second is surest.

    Args:
        in_float: the float model's predictions for (N,) images.
        in_onnx: the file's predictions for the same.
        labels: their N classes by name.
        names: of the classes.
        picture: opens the picture of an index.
    """
    differ = (in_float.classes != in_onnx.classes).nonzero()[:, 0]
    surest = differ[in_onnx.shares[differ].argsort(descending=True, stable=True)][:SHOWN]
    examples = [
        Disagreement(
            index=index,
            label=labels[index],
            float_guess=names[int(in_float.classes[index])],
            float_share=100 * float(in_float.shares[index]),
            onnx_guess=names[int(in_onnx.classes[index])],
            onnx_share=100 * float(in_onnx.shares[index]),
            png=_thumbnail(picture(index)),
        )
        for index in surest.tolist()
    ]
    return Disagreements(count=len(differ), examples=examples)


def _thumbnail(picture: Image.Image) -> str:
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    content = BytesIO()
    picture.save(content, format="png")
    return base64.b64encode(content.getvalue()).decode()
