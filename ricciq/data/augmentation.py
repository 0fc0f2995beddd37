"""Random augmentation of training images, under timm's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ricciq.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from timm.data.mixup import Mixup
    from timm.data.random_erasing import RandomErasing
    from torch import Tensor

    Transform = Callable[[Image.Image], Tensor]
from ricciq.data.preprocessing import SMALL_INPUT, Preprocessing

_Area = Annotated[float, Field(gt=0, le=1)]
_Ratio = Annotated[float, Field(gt=0)]


def _key(description: str, **bounds: Any) -> Any:
    """The description and bounds of a recipe's key; `Recipe` checks them, not this dataclass."""
    return Field(description=description, **bounds)


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training images, under timm's names.

    The defaults are milder than timm's, which suit training from scratch for hundreds of epochs:
    fine-tuning is short, and the network was already trained on augmented images.
    """

    no_aug: Annotated[
        bool | None,
        _key(
            "True turns augmentation off, false turns it on. Without a value it is on, but for "
            "inputs of up to 64 pixels only if pad_crop, auto_augment or reprob is set."
        ),
    ] = None
    scale: Annotated[
        tuple[_Area, _Area],
        _key("Smallest and largest share of the area that the random resized crop keeps."),
    ] = (0.35, 1.0)
    ratio: Annotated[
        tuple[_Ratio, _Ratio], _key("Smallest and largest aspect ratio of the random resized crop.")
    ] = (
        3 / 4,
        4 / 3,
    )
    hflip: Annotated[float, _key("Probability of a horizontal flip.", ge=0, le=1)] = 0.5
    color_jitter: Annotated[
        float, _key("Strength of random brightness, contrast and saturation.", ge=0)
    ] = 0.0
    auto_augment: Annotated[
        str | None, _key("Augmentation policy, as timm writes it, such as rand-m7-mstd0.5.")
    ] = None
    reprob: Annotated[
        float, _key("Probability of erasing a random rectangle (random erasing).", ge=0, le=1)
    ] = 0.0
    pad_crop: Annotated[
        int,
        _key(
            "Pad with this many black pixels and crop at random, instead of the random resized "
            "crop; 4 is usual for CIFAR-10, 2 for Fashion-MNIST; 0 is off.",
            ge=0,
        ),
    ] = 0
    mixup: Annotated[
        float, _key("Alpha of Mixup (arXiv 1710.09412), which blends two images; 0 is off.", ge=0)
    ] = 0.0
    cutmix: Annotated[
        float,
        _key(
            "Alpha of CutMix (arXiv 1905.04899), which pastes a part of another image; 0 is off.",
            ge=0,
        ),
    ] = 0.0
    mixup_prob: Annotated[
        float, _key("Probability that Mixup or CutMix is applied to a batch.", ge=0, le=1)
    ] = 1.0
    mixup_switch_prob: Annotated[
        float, _key("Probability of CutMix instead of Mixup, if both are on.", ge=0, le=1)
    ] = 0.5

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix is on."""
        return bool((self.mixup or self.cutmix) and not self.no_aug)

    def mixing(self, num_classes: int) -> Mixup | None:
        """timm's Mixup and CutMix of whole batches, or None if both are off."""
        from timm.data.mixup import Mixup

        if not self.mixes:
            return None
        return Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.mixup_prob,
            switch_prob=self.mixup_switch_prob,
            label_smoothing=0.0,  # the loss applies it
            num_classes=num_classes,
        )

    def erasing(self) -> RandomErasing | None:
        """timm's random erasing of normalized images, or None if it is off."""
        from timm.data.random_erasing import RandomErasing

        if not self.reprob:
            return None
        return RandomErasing(self.reprob, device="cpu")  # type: ignore[no-untyped-call]

    def transform(self, preprocessing: Preprocessing) -> Transform | None:
        """timm's random training transform up to random erasing, or None if augmentation is off.

        Returns:
            A function from an image to a uint8 tensor of shape (C, H, W).

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
        # After a padded crop, timm's crop takes the whole image.
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
                interpolation=preprocessing.interpolation,
                mean=preprocessing.mean,
                normalize=False,
            )
        except (AssertionError, ValueError) as error:  # what timm raises for a bad policy
            raise UsageError(
                f"auto_augment {self.auto_augment!r} is not a policy of timm; give one such as "
                "rand-m7-mstd0.5, or remove it"
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
