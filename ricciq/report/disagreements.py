"""Validation images that the float model and the ONNX file classify differently."""

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
"""Largest number of examples."""
THUMBNAIL = 112
"""Longer side of an example, in pixels."""


class Disagreement(BaseModel):
    """An image that the two models classify differently.

    Attributes:
        index: position of the image in the validation split, from 0.
        label: name of its class; None without labels.
        float_guess: class that the float model predicts.
        float_share: probability that it gives this class, percent.
        onnx_guess: class that the ONNX file predicts.
        onnx_share: probability that it gives this class, percent.
        png: thumbnail of the image, as a PNG in base64.
    """

    index: int
    label: str | None
    float_guess: str
    float_share: float
    onnx_guess: str
    onnx_share: float
    png: str


class Disagreements(BaseModel):
    """The number of such images, and some examples.

    Attributes:
        count: number of such images.
        examples: at most `SHOWN` of them.
    """

    count: int
    examples: list[Disagreement]

    def save(self, path: Path) -> None:
        """Write the file that `load` reads."""
        write_atomically(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Disagreements:
        """Read a file that `save` wrote; empty if it does not exist.

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
                f"{path} is not a list of examples that a run wrote ({reason}); remove it to make "
                "the page without examples"
            ) from None


def find_disagreements(
    in_float: Predictions,
    in_onnx: Predictions,
    labels: list[str | None],
    names: list[str],
    open_image: Callable[[int], Image.Image],
) -> Disagreements:
    """Find the images that two models classify differently.

    Args:
        in_float: the float model's predictions for N images.
        in_onnx: the ONNX file's predictions for the same images.
        labels: the N names of their classes; None without labels.
        names: of the classes.
        open_image: opens the image at an index.

    Returns:
        Their number, and as examples those with the highest probability in the ONNX file.
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
            png=_thumbnail(open_image(index)),
        )
        for index in surest.tolist()
    ]
    return Disagreements(count=len(differ), examples=examples)


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = BytesIO()
    image.save(content, format="png")
    return base64.b64encode(content.getvalue()).decode()
