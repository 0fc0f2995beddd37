"""The BatchNorm behind a layer: its affine form, and what is needed to move it into the layer."""

from __future__ import annotations

from collections import OrderedDict

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNorm = _BatchNorm
"""The common base of `nn.BatchNorm1d` and `nn.BatchNorm2d`."""


def affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation as ``factor * x + shift``, both (channels,) in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.double()


def plain(norm: BatchNorm | None) -> BatchNorm | None:
    """The normalization alone, without the activation of timm's BatchNormAct2d."""
    if not isinstance(norm, BatchNormAct2d):
        return norm
    alone = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, device="meta")
    alone.weight, alone.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(alone, name, buffer)
    return alone.train(norm.training)


def rest_of(norm: nn.Module) -> nn.Module:
    """What remains where a normalization was removed: its activation, or an identity."""
    if isinstance(norm, BatchNormAct2d):
        return nn.Sequential(OrderedDict(drop=norm.drop, act=norm.act))
    return nn.Identity()


@torch.no_grad()
def turn_negative_rows(weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> None:
    """Negate the rows whose BatchNorm weight is negative, and this weight; the output is the same.

    Folding a negative weight changes the sign of codes, which a two's complement grid cannot hold:
    the file would need a sign for each row.

    Args:
        weight: (rows, ...) of the layer in front, changed in place.
        bias: (rows,) of that layer, changed in place.
        norm: changed in place.
    """
    if norm.weight is None or norm.running_mean is None:
        return
    sign = torch.where(norm.weight < 0, -1.0, 1.0)
    weight.mul_(sign.view(-1, *[1] * (weight.dim() - 1)))
    for vector in (bias, norm.weight, norm.running_mean):
        if vector is not None:
            vector.mul_(sign)
