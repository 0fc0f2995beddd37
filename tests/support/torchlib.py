"""torch's exporter collects its ONNX operators for every file: a second, which tests pay once."""

import copy
from functools import cache

from torch.onnx._internal.exporter._registration import ONNXRegistry


def collect_once() -> None:
    """Let every export of this process start from a copy of the first one's operators.

    The benchmarks and the main job of `.ci/run` export without it.
    """
    collect = cache(ONNXRegistry.from_torchlib)

    def from_torchlib(opset_version: int) -> ONNXRegistry:
        registry = copy.copy(collect(opset_version))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[method-assign]
