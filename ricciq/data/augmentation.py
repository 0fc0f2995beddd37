"""What varies between two looks at a training image, under timm's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ricciq.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from timm.data.mixup import Mixup
    from torch import Tensor

    Transform = Callable[[Image.Image], Tensor]
from ricciq.data.preprocessing import SMALL_INPUT, Preprocessing

# Checked where a recipe is read; a plain dataclass does not check.
_Share = Annotated[float, Field(ge=0, le=1)]
_Area = Annotated[float, Field(gt=0, le=1)]
_Ratio = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Augmentation:
    """What varies between two looks at a training picture, under timm's names.

    The defaults are milder than timm's, which suit training from scratch for hundreds of epochs:
    fine-tuning is short and starts from a net that has seen varied pictures.

    Attributes:
        no_aug: True turns all of this off, False on; None turns it on for inputs of more than 64
            pixels, and for any input with a `pad_crop`, an `auto_augment` or a `reprob`. Mixing is
            off with True only.
        scale: share of the area that the random resized crop keeps, (least, most).
        ratio: aspect ratio of that crop, (least, most).
        hflip: probability of a left-right flip.
        color_jitter: strength of random brightness, contrast and saturation.
        auto_augment: timm's policy string, such as "rand-m7-mstd0.5".
        reprob: probability of erasing a random rectangle.
        pad_crop: pad with this many black pixels and crop at random, instead of the random
            resized crop; 4 is usual for CIFAR-10, 2 for Fashion-MNIST.
        mixup: alpha of Mixup (arXiv 1710.09412): how evenly two pictures are blended; 0 is off.
        cutmix: alpha of CutMix (arXiv 1905.04899), which pastes a part of one picture; 0 is off.
        mixup_prob: probability that a batch is mixed.
        mixup_switch_prob: probability of CutMix where both are on.
    """

    no_aug: bool | None = None
    scale: tuple[_Area, _Area] = (0.35, 1.0)
    ratio: tuple[_Ratio, _Ratio] = (3 / 4, 4 / 3)
    hflip: _Share = 0.5
    color_jitter: Annotated[float, Field(ge=0)] = 0.0
    auto_augment: str | None = None
    reprob: _Share = 0.0
    pad_crop: Annotated[int, Field(ge=0)] = 0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    mixup_prob: _Share = 1.0
    mixup_switch_prob: _Share = 0.5

    def mixing(self, num_classes: int) -> Mixup | None:
        """timm's Mixup and CutMix of whole batches, or None where neither is asked for."""
        from timm.data.mixup import Mixup

        if self.no_aug or not (self.mixup or self.cutmix):
            return None
        return Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.mixup_prob,
            switch_prob=self.mixup_switch_prob,
            label_smoothing=0.0,  # the loss smooths
            num_classes=num_classes,
        )

    def transform(self, preprocessing: Preprocessing) -> Transform | None:
        """timm's random training transform, or None where nothing varies.

        Raises:
            UsageError: timm does not know the `auto_augment` policy.
        """
        from timm.data.transforms_factory import create_transform
        from torchvision import transforms

        height, width = size = preprocessing.input_size[1:]
        asked_for = self.pad_crop or self.auto_augment or self.reprob
        small = max(size) <= SMALL_INPUT and not asked_for
        if small if self.no_aug is None else self.no_aug:
            return None
        # Behind a padded crop, timm's crop is left to take the whole picture.
        whole = (1.0, 1.0), (width / height, width / height)
        scale, ratio = whole if self.pad_crop else (self.scale, self.ratio)
        try:
            vary: Transform = create_transform(
                input_size=preprocessing.input_size,
                is_training=True,
                scale=scale,
                ratio=ratio,
                hflip=self.hflip,
                color_jitter=self.color_jitter or None,  # type: ignore[arg-type]
                auto_augment=self.auto_augment,
                re_prob=self.reprob,
                interpolation=preprocessing.interpolation,
                mean=preprocessing.mean,
                std=preprocessing.std,
            )
        except (AssertionError, ValueError) as error:  # how timm refuses a policy
            raise UsageError(
                f"auto_augment {self.auto_augment!r} is no policy that timm knows: "
                "give one such as rand-m7-mstd0.5, or leave it out"
            ) from error
        if not self.pad_crop:
            return vary
        mode = transforms.InterpolationMode(preprocessing.interpolation)
        whole_then_crop: Transform = transforms.Compose(
            [
                transforms.Resize(size, interpolation=mode),
                transforms.RandomCrop(size, padding=self.pad_crop),
                vary,
            ]
        )
        return whole_then_crop
