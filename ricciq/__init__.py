"""ricciq: quantize pretrained vision models to 1-8 bits with Ricci-flow-corrected gradients.

Public names are imported when first used, so importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ricciq._version import __version__ as __version__

if TYPE_CHECKING:
    from ricciq.convert.rewrite import quantize
    from ricciq.data.open import open_data
    from ricciq.data.preprocessing import Preprocessing
    from ricciq.deploy.export import export_onnx
    from ricciq.errors import RicciqError
    from ricciq.estimators.ricci_flow import RicciFlow
    from ricciq.models.factory import load_model
    from ricciq.quant.calibration import calibrate
    from ricciq.recipe import Recipe
    from ricciq.training.loop import finetune
    from ricciq.workflows.evaluate import evaluate
    from ricciq.workflows.quantize import run


_HOMES = {
    "Recipe": "recipe",
    "run": "workflows.quantize",
    "load_model": "models.factory",
    "open_data": "data.open",
    "Preprocessing": "data.preprocessing",
    "evaluate": "workflows.evaluate",
    "quantize": "convert.rewrite",
    "calibrate": "quant.calibration",
    "finetune": "training.loop",
    "RicciFlow": "estimators.ricci_flow",
    "export_onnx": "deploy.export",
    "RicciqError": "errors",
}

__all__ = [
    "Preprocessing",
    "Recipe",
    "RicciFlow",
    "RicciqError",
    "calibrate",
    "evaluate",
    "export_onnx",
    "finetune",
    "load_model",
    "open_data",
    "quantize",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ricciq' has no attribute {name!r}")
    return getattr(import_module(f"ricciq.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
