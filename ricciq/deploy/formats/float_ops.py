"""Float weights with discrete values, and float arithmetic: for runtimes without quantization."""

from __future__ import annotations

from torch import Tensor, nn

from ricciq.deploy.modules import Constant, DeployedActivation, DeployedLayer, in_float
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


def apply(deployed: nn.Module) -> nn.Module:
    """Change a deployed model, in place, to export float weights and float arithmetic.

    Args:
        deployed: from `ricciq.deploy.modules.deploy`.

    Returns:
        The same model, with the same outputs, up to numbers halfway between two codes.
    """
    modules = list(deployed.modules())
    for module in modules:
        if isinstance(module, DeployedLayer):
            module.is_integer = False
            module.weight_quantizer = Constant(module.weight_quantizer())
            module.bias_quantizer = Constant(module.bias_quantizer())
    for module in modules:
        if isinstance(module, DeployedActivation):
            changed = _FloatActivation(module)
            for name in names_of(module, deployed):
                deployed.set_submodule(name, changed)
    return deployed
