"""Small networks for small images, registered with timm; two have bundled float weights.

Once this module is imported, `timm.create_model("digits_resnet8", pretrained=True)` works.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

BUNDLED = Path(__file__).parent / "checkpoints"


class SmallResNet(ResNet):
    """timm's ResNet for images of 8 to 32 pixels: a 3x3 stem, no pooling, three stages.

    The stages have 16, 32 and 64 channels, and the second and third halve the size, as in the
    CIFAR-10 networks of He et al. 2015 (arXiv 1512.03385), unless a network says otherwise.
    """

    def __init__(
        self,
        blocks: int,
        stem_stride: int,
        in_chans: int = 3,
        widths: tuple[int, int, int] = (16, 32, 64),
        last_stride: int = 2,
        **kwargs: Any,
    ) -> None:
        """Build the network.

        Args:
            blocks: number of blocks in a stage.
            stem_stride: stride of the first convolution.
            in_chans: number of input channels.
            widths: channels of the stages; the stem has as many as the first.
            last_stride: stride of the last stage.
            **kwargs: as for timm's ResNet.
        """
        # timm's plain stem always has 64 channels. Its deep stem has twice stem_width channels, so
        # that the stages are built for them; its convolutions are then replaced by a single one.
        super().__init__(
            BasicBlock,  # type: ignore[arg-type]  # timm annotates a class as an instance
            (blocks,) * 3,
            in_chans=in_chans,
            channels=widths,
            stem_type="deep",
            stem_width=widths[0] // 2,
            **kwargs,
        )
        stem = nn.Conv2d(in_chans, widths[0], 3, stride=stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", stem)
        self.add_module("maxpool", nn.Identity())
        # A sequence, since timm splits layers to recompute activations.
        self.add_module("layer4", nn.Sequential())
        if last_stride != 2:  # timm's stride
            for name in ("conv1", "downsample.0"):
                convolution = cast(nn.Conv2d, self.get_submodule(f"layer3.0.{name}"))
                convolution.stride = (last_stride, last_stride)
        reductions = [stem_stride * factor for factor in (1, 1, 2, 2 * last_stride)]
        for info, reduction in zip(self.feature_info, reductions, strict=True):
            info["reduction"] = reduction


class SmallMobileNet(EfficientNet):
    """timm's MobileNetV2-like EfficientNet for images of 28 pixels: five inverted residuals.

    A stem with stride 2 is followed by a depthwise separable block with 16 channels, two inverted
    residuals with 24 and two with 40 channels. The first of each pair has stride 2, all kernels are
    3x3, and the expansion ratio is 4 (Sandler et al. 2018, arXiv 1801.04381). Depthwise
    convolutions lose the most accuracy to quantization.
    """

    def __init__(self, **kwargs: Any) -> None:
        """Build the network; arguments as for timm's EfficientNet."""
        blocks = [
            ["ds_r1_k3_s1_c16"],
            ["ir_r1_k3_s2_e4_c24", "ir_r1_k3_s1_e4_c24"],
            ["ir_r1_k3_s2_e4_c40", "ir_r1_k3_s1_e4_c40"],
        ]
        defaults = {"stem_size": 16, "num_features": 128, "act_layer": nn.ReLU6}
        arguments = decode_arch_def(blocks)  # type: ignore[no-untyped-call]
        super().__init__(block_args=arguments, **{**defaults, **kwargs})


def _config(size: tuple[int, int, int], classes: int, **values: Any) -> dict[str, Any]:
    return {
        "input_size": size,
        "num_classes": classes,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "first_conv": "conv1",
        "classifier": "fc",
        **values,
    }


default_cfgs = generate_default_cfgs(
    {
        # Mean and standard deviation of the 1,437 training images of `digits`, pixels over 255.
        "digits_resnet8.ricciq": _config(
            (1, 8, 8),
            10,
            mean=(0.3054,),
            std=(0.3760,),
            file=str(BUNDLED / "digits_resnet8.safetensors"),
        ),
        # Of the 60,000 training images of Fashion-MNIST.
        "fashion_resnet8.ricciq": _config(
            (1, 28, 28),
            10,
            mean=(0.2860,),
            std=(0.3530,),
            file=str(BUNDLED / "fashion_resnet8.safetensors"),
        ),
        "fashion_mobilenet": _config(
            (1, 28, 28),
            10,
            mean=(0.2860,),
            std=(0.3530,),
            first_conv="conv_stem",
            classifier="classifier",
        ),
        # Of the 50,000 training images of CIFAR-10: the values in common use.
        "cifar_resnet20": _config(
            (3, 32, 32), 10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
        ),
    }
)


def _build(variant: str, pretrained: bool, **kwargs: Any) -> ResNet:
    built: ResNet = build_model_with_cfg(SmallResNet, variant, pretrained, **kwargs)
    return built


@register_model
def digits_resnet8(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Three blocks for the 8x8 images of `digits`: 1.2 million parameters.

    It has the channels of resnet18's first stages on 4x4 and 2x2 pixels, so that most of its time
    is spent on reading weights, as in large networks: integer kernels are much faster then.

    Args:
        pretrained: load the bundled float weights.
        **kwargs: as for timm's ResNet.
    """
    shape = {"blocks": 1, "stem_stride": 2, "widths": (64, 128, 256), "last_stride": 1}
    return _build("digits_resnet8", pretrained, **shape, **kwargs)


@register_model
def fashion_resnet8(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Three blocks for the 28x28 images of Fashion-MNIST, with a stem of stride 2.

    Args:
        pretrained: load the bundled float weights.
        **kwargs: as for timm's ResNet.
    """
    return _build("fashion_resnet8", pretrained, blocks=1, stem_stride=2, **kwargs)


@register_model
def fashion_mobilenet(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """Five inverted residuals for the 28x28 images of Fashion-MNIST: 39,000 parameters.

    Args:
        pretrained: not available; there are no bundled weights.
        **kwargs: as for timm's EfficientNet.
    """
    built: EfficientNet = build_model_with_cfg(
        SmallMobileNet, "fashion_mobilenet", pretrained, **kwargs
    )
    return built


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Nine blocks for the 32x32 images of CIFAR-10.

    Args:
        pretrained: not available; there are no bundled weights.
        **kwargs: as for timm's ResNet.
    """
    return _build("cifar_resnet20", pretrained, blocks=3, stem_stride=1, **kwargs)
