"""Widths that decrease during training, such as 8, then 4, then those of the plan."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ricciq.convert.rewrite import quantized_layers
from ricciq.quant.grid import Bits, count_codes
from ricciq.quant.quantizer import Quantizer


class Progression:
    """Sets the widths of a converted model's quantizers for each stage of training.

    Stages are equal parts of the epochs. The last one has the widths of the plan; in the others,
    quantizers with fewer bits than the stage get its width (progressive quantization, Zhuang et al.
    2018, arXiv 1711.00205).

    Args:
        model: converted, with the widths of the last stage.
        widths: of the stages before the last, decreasing.
        epochs: in all stages together.
    """

    def __init__(self, model: nn.Module, widths: Sequence[int], epochs: int) -> None:
        self.model, self.widths, self.epochs = model, tuple(widths), epochs
        self.planned: list[tuple[Quantizer, Bits]] = [
            (module, module.bits) for module in model.modules() if isinstance(module, Quantizer)
        ]
        self.stage = len(self.widths)

    def stage_of(self, epoch: int) -> int:
        """The stage of an epoch, both counted from 0."""
        return min(epoch * (len(self.widths) + 1) // max(self.epochs, 1), len(self.widths))

    def is_last(self, epoch: int) -> bool:
        """Whether an epoch, counted from 0, is in the last stage."""
        return self.stage_of(epoch) == len(self.widths)

    def enter(self, stage: int) -> bool:
        """Set the widths of a stage.

        Returns:
            Whether the stage is another one, so that scales must be found again.

        Raises:
            ValueError: a quantizer cannot change its width.
        """
        if stage == self.stage:
            return False
        self.stage = stage
        for quantizer, planned in self.planned:
            bits = planned
            if stage < len(self.widths):
                bits = max(planned, self.widths[stage], key=count_codes)
            quantizer.set_bits(bits)
        return True

    def fit_weights(self, candidates: int) -> None:
        """Calibrate the scales of the weights for the present widths.

        Args:
            candidates: see `WeightQuantizer.calibrate`.
        """
        for layer in quantized_layers(self.model).values():
            layer.weight_quantizer.calibrate(layer.latent, candidates)
