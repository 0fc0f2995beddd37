"""Float weights with discrete values, and float arithmetic: for runtimes without quantization."""

from __future__ import annotations

from torch import Tensor, nn

from ricciq.deploy.modules import DeployedActivation, DeployedLayer, in_float
from ricciq.layers.base import names_of


class _FloatActivation(nn.Module):
    """An activation quantizer that is exported as Div, Round, Clip and Mul."""

    scale: Tensor
    zero_point: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, quantizer: DeployedActivation) -> None:
        super().__init__()
        for name, buffer in quantizer.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x; the shape stays."""
        return in_float(x, self.scale, self.zero_point, self.lowest, self.highest)


class _Constant(nn.Module):
    """A module that returns a constant tensor."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        """Return the tensor."""
        return self.value


def apply(deployed: nn.Module) -> nn.Module:
    """Change a deployed model, in place, to export float weights and float arithmetic.

    Args:
        deployed: from `ricciq.deploy.modules.deploy`.

    Returns:
        The same model, with the same outputs.
    """
    modules = list(deployed.modules())
    for module in modules:
        if isinstance(module, DeployedLayer):  # its bias depends on the input quantizer: first
            module.bias = module.float_bias()
            module.weight_quantizer = _Constant(module.weight_quantizer())
    for module in modules:
        if isinstance(module, DeployedActivation):
            changed = _FloatActivation(module)
            for name in names_of(module, deployed):
                deployed.set_submodule(name, changed)
    return deployed
