"""Discrete convolutions over sequences; onnxruntime runs them with its 2-D kernel."""

from __future__ import annotations

from torch import nn

from ricciq.layers.conv import QuantConv
from ricciq.layers.registry import quantizes


@quantizes(nn.Conv1d)
class QuantConv1d(QuantConv, nn.Conv1d):
    """A convolution over sequences, (B, C, L) -> (B, rows, L')."""

    norms = (nn.BatchNorm1d,)
