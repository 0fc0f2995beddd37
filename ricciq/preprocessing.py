"""How a picture becomes a tensor: one description, used to train, to evaluate and inside the ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Preprocessing:
    """Size and normalization of a model's input, in timm's vocabulary.

    Attributes:
        input_size: (channels, height, width) in pixels.
        mean: per-channel mean of pictures scaled to [0, 1].
        std: per-channel standard deviation of pictures scaled to [0, 1].
        interpolation: resampling used to resize, as timm names it.
        crop_pct: share of the resized picture that the centre crop keeps.
        crop_mode: how the evaluation crop is taken, as timm names it.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Build from a plain mapping (JSON or timm's data config); unknown keys are ignored."""
        return cls(
            input_size=tuple(int(n) for n in values["input_size"]),  # type: ignore[arg-type]
            mean=tuple(float(x) for x in values["mean"]),
            std=tuple(float(x) for x in values["std"]),
            interpolation=str(values.get("interpolation", "bilinear")),
            crop_pct=float(values.get("crop_pct", 1.0)),
            crop_mode=str(values.get("crop_mode", "center")),
        )

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping that JSON can hold."""
        return asdict(self)
