"""PyTorch's transformer layers, whose fast path reads the weights of their linear layers itself.

It does so in evaluation without hooks, where what a discrete layer computes would be passed over.
"""

from __future__ import annotations

from torch import nn

from ricciq.layers.base import QuantLayer


def leave_fast_path(model: nn.Module) -> None:
    """Let transformer layers call the discrete layers in them, in every mode.

    Args:
        model: converted, changed in place.
    """
    for module in model.modules():
        if not any(isinstance(child, QuantLayer) for child in module.modules()):
            continue
        # What PyTorch itself sets where its fast path does not apply.
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
