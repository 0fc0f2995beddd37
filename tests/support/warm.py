"""Imported by the process that tests fork their commands from: all that is slow the first time."""

import matplotlib.figure  # noqa: F401
import onnxruntime  # noqa: F401
import sklearn.datasets
import sklearn.model_selection  # noqa: F401
import timm  # noqa: F401
import torch
from garbage import collect_garbage_rarely
from torch import nn
from torchlib import collect_once

import ricciq.cli.app
import ricciq.workflows.quantize  # noqa: F401
from ricciq.layers.operators import OPSET

torch.set_num_threads(1)
collect_once()
layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)
torch.onnx.export(
    nn.Sequential(*layers).eval(),
    (torch.zeros(2, 1, 8, 8),),
    dynamic_shapes=({0: torch.export.Dim("batch")},),
    opset_version=OPSET,
    verbose=False,
)
collect_garbage_rarely()
