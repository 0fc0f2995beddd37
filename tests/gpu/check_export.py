"""A model on the device becomes the file that it would become on a CPU; `doctor` sees the card."""

from __future__ import annotations

import copy

import torch
from networks import DEVICE, Training, without_tf32

from ricciq.deploy.export import export_onnx
from ricciq.deploy.modules import deploy
from ricciq.deploy.session import open_session, session_predictor
from ricciq.evaluation import evaluate
from ricciq.workflows.doctor import examine


def test_export_from_the_device(tmp_path):
    without_tf32()
    training = Training(DEVICE)
    for _ in range(5):
        assert training.step()
    deployed = deploy(training.model.eval())
    path = export_onnx(deployed, tmp_path / "model.onnx", training.job.preprocessing)
    assert next(deployed.buffers()).device.type == DEVICE.type  # it stays where it is
    on_cpu = copy.deepcopy(deployed).cpu()
    predictors = {
        "torch": on_cpu,
        "file": session_predictor(open_session(path, optimize=False), path),
        "device": lambda images: deployed(images.to(DEVICE)),
    }
    metrics = evaluate(predictors, training.job.loader("val"))
    assert metrics["file"].agreement >= 99.5  # a sum beside a rounding tie may fall either way
    assert metrics["device"].agreement >= 99


def test_doctor_lists_the_card():
    found = examine()
    assert len(found["cuda"]) == torch.cuda.device_count()
    if DEVICE.type == "cuda":
        assert found["cuda"][0]["name"] == torch.cuda.get_device_name(0)
        assert found["cuda_build"] == torch.version.cuda
