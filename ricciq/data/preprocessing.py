"""How an image becomes an input tensor: one description for training, evaluation and ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ricciq.errors import DataError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    Transform = Callable[[Image.Image], Tensor]


InputType = Literal["float", "uint8"]
"""What a model takes: normalized images, (B, C, H, W) float32; or pixels, (B, H, W, C) uint8."""
SMALL_INPUT = 64
"""Largest height or width, in pixels, of inputs that are not augmented by default."""
LARGEST_SIDE = 8191
"""Largest height or width of an input, in pixels."""
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
"""Methods of resizing, as timm names them."""
_LARGEST_ROUNDING = 0.01
"""Largest difference between a pixel and its normalized value mapped back, in levels of 255."""
_CROP_MODES = {"center", "squash", "border"}


@dataclass(frozen=True)
class Preprocessing:
    """Size and normalization of a model's input, under timm's names.

    Attributes:
        input_size: (channels, height, width) in pixels.
        mean: per-channel mean of images scaled to [0, 1].
        std: per-channel standard deviation of images scaled to [0, 1].
        interpolation: method of resizing, as timm names it.
        crop_pct: share of the resized image that the centre crop keeps.
        crop_mode: kind of evaluation crop, as timm names it.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Build from a plain mapping, as JSON or timm's data config; unknown keys are ignored.

        Raises:
            ValueError: a value is missing, of the wrong type, or out of bounds.
        """
        try:
            made = cls(
                input_size=tuple(int(n) for n in values["input_size"]),  # type: ignore[arg-type]
                mean=tuple(float(x) for x in values["mean"]),
                std=tuple(float(x) for x in values["std"]),
                interpolation=str(values.get("interpolation", "bilinear")),
                crop_pct=float(values.get("crop_pct", 1.0)),
                crop_mode=str(values.get("crop_mode", "center")),
            )
            channels, height, width = made.input_size
        except KeyError as error:
            raise ValueError(f"preprocessing lacks {error}") from None
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ValueError(f"preprocessing has a value of the wrong type: {error}") from None
        for name, good in {
            "input_size": channels in (1, 3)
            and 0 < min(height, width) <= max(height, width) <= LARGEST_SIDE,
            "mean": len(made.mean) == channels and all(map(math.isfinite, made.mean)),
            "std": len(made.std) == channels and all(0 < x < math.inf for x in made.std),
            "interpolation": made.interpolation in get_args(Interpolation),
            "crop_pct": 0.1 <= made.crop_pct <= 2,
            "crop_mode": made.crop_mode in _CROP_MODES,
        }.items():
            if not good:
                raise ValueError(f"preprocessing has an invalid {name}, {getattr(made, name)!r}")
        return made

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping that JSON can represent."""
        return asdict(self)

    @property
    def brief(self) -> str:
        """Size, crop and normalization for a message."""
        channels, height, width = self.input_size
        mean, std = (" ".join(f"{x:.4g}" for x in values) for values in (self.mean, self.std))
        return (
            f"{channels}x{height}x{width}, {self.interpolation}, crop {self.crop_pct:g}, mean "
            f"{mean}, std {std}"
        )

    @property
    def mode(self) -> str:
        """The PIL mode that images must have: "L" for one channel, "RGB" for three."""
        return "L" if self.input_size[0] == 1 else "RGB"

    def evaluation_transform(self) -> Transform:
        """timm's evaluation transform: resize, centre crop, scale to [0, 1], normalize.

        Returns:
            A function from an image of mode `mode` to a float32 tensor of shape `input_size`.
        """
        return self._transform(normalize=True)

    def pixel_transform(self) -> Transform:
        """The evaluation transform without its arithmetic: resize and centre crop.

        Returns:
            A function from an image of mode `mode` to a uint8 tensor of shape `input_size`.
        """
        return self._transform(normalize=False)

    def to_pixels(self, images: Tensor) -> Tensor:
        """The pixels that images were before they were normalized.

        Args:
            images: (B, C, H, W) float32, as `evaluation_transform` makes them.

        Returns:
            (B, C, H, W) uint8. To normalize them gives the images again, bit for bit.

        Raises:
            DataError: the images were not made from pixels, or with another normalization.
        """
        import torch

        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        levels = (images * std + mean) * 255
        pixels = levels.round().clamp(0, 255)
        if not ((levels - pixels).abs() <= _LARGEST_ROUNDING).all():
            raise DataError(
                f"these images are not pixels normalized with mean {self.mean} and std {self.std}; "
                "give images prepared as the model needs them, or uint8 pixels"
            )
        return pixels.to(torch.uint8)

    def _transform(self, *, normalize: bool) -> Transform:
        # Imported here, so that reading a description needs no torch.
        from timm.data.transforms_factory import create_transform

        transform: Transform = create_transform(
            input_size=self.input_size,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            normalize=normalize,
        )
        return transform
