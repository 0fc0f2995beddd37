"""PACT: the clipping point is learned (Choi et al. 2018, arXiv 1805.06085)."""

from __future__ import annotations

from ricciq.quant.activation import ActivationQuantizer


class PACTActivations(ActivationQuantizer):
    """Activations whose scale is learned from what is clipped alone (eq. 3).

    It has LSQ's gain, and no weight decay unlike the paper's.
    """

    clip_only = True
