"""Where onnxruntime's kernels are known to the last bit, and what must be equal there."""

from __future__ import annotations

import torch
from torch import Tensor


def kernels_are_known() -> bool:
    """Whether this CPU is of the kind that `ricciq.deploy.kernels` was compared on."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def check_same(found: Tensor, expected: Tensor, name: str = "") -> None:
    """Check that numbers are equal; on other CPUs, that nearly all are.

    Args:
        found: in torch.
        expected: by onnxruntime, same shape.
        name: what they are, for messages.
    """
    assert found.shape == expected.shape, name
    different = (found != expected).float().mean().item()
    assert different <= (0 if kernels_are_known() else 1e-3), f"{name}: {different:.2%} differ"
