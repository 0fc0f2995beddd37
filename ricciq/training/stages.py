"""Widths that fall while training goes on, as 8, then 4, then those of the plan."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ricciq.convert.rewrite import quantized_layers
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.grid import Bits, count_codes
from ricciq.quant.weight import WeightQuantizer


class Progression:
    """Gives a converted model's quantizers the widths of a stage of training.

    A stage is an equal share of the epochs; the last one has the widths of the plan. In the others
    what has fewer bits gets those of the stage (progressive quantization, Zhuang et al. 2018, arXiv
    1711.00205).

    Args:
        model: converted; its widths are those of the last stage.
        widths: of the stages before the last, falling.
        epochs: how many there are to share.
    """

    def __init__(self, model: nn.Module, widths: Sequence[int], epochs: int) -> None:
        self.model, self.widths, self.epochs = model, tuple(widths), epochs
        quantizers = [
            m for m in model.modules() if isinstance(m, WeightQuantizer | ActivationQuantizer)
        ]
        self.planned: list[tuple[WeightQuantizer | ActivationQuantizer, Bits]] = [
            (quantizer, quantizer.bits) for quantizer in quantizers
        ]
        self.stage = len(self.widths)

    def stage_of(self, epoch: int) -> int:
        """The stage that an epoch, counted from 0, is in."""
        return min(epoch * (len(self.widths) + 1) // max(self.epochs, 1), len(self.widths))

    def is_last(self, epoch: int) -> bool:
        """Whether an epoch, counted from 0, has the widths of the plan."""
        return self.stage_of(epoch) == len(self.widths)

    def enter(self, stage: int) -> bool:
        """Set the widths of a stage; whether they were others, and steps must be found anew."""
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
        """Find the steps of the weights anew, as calibration did for the widths before."""
        for layer in quantized_layers(self.model).values():
            layer.weight_quantizer.calibrate(layer.latent, candidates)
