"""Bits found for the user: a plan whose layers have the widths that a budget is spent on best."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ricciq.allocation import Overhead, allocate, average_bits
from ricciq.calibration import calibrate
from ricciq.convert import Plan, convert
from ricciq.deployment import DeployedWeight, deploy
from ricciq.errors import UsageError
from ricciq.export import export_onnx, stored_in_onnx
from ricciq.journal import Journal
from ricciq.modelfile import size_with_external_data
from ricciq.plots import draw_sensitivity, write_png
from ricciq.preparation import Job
from ricciq.quantizer import ActivationQuantizer
from ricciq.runfolder import RunFolder, read_csv, write_csv
from ricciq.sensitivity import Sensitivity, measure_sensitivity
from ricciq.tables import as_text, sensitivity_table

PICTURES = 512
"""How many are shown to the network for each layer and width."""
SPARE = 1000
"""Bytes left for what a file is told after training: its accuracy."""


def with_chosen_bits(
    job: Job, journal: Journal, folder: RunFolder | None = None, resume: bool = False
) -> Job:
    """Replace the widths of a plan by those that the recipe's budget allows; others stay.

    The first and the last layer keep the recipe's ``edge_bits``, as they do with any ``--bits``.

    Args:
        job: from `prepare`, its model still float.
        journal: where the choice is shown.
        folder: receives sensitivity.csv and its plot.
        resume: take what is there from before.

    Raises:
        UsageError: the budget is too small, or there is no layer between the first and the last.
    """
    wanted = job.recipe.quantization
    if wanted.weight_bits != "auto":
        return job
    if (
        resume
        and folder is not None
        and (rows := read_csv(folder.sensitivity, {"layer": str, "bits": int}))
    ):
        return job._replace(plan=_planned(job.plan, {r["layer"]: r["bits"] for r in rows}))
    names = [layer.name for layer in job.plan.layers[1:-1]]
    if not names:
        raise UsageError(
            f"{job.recipe.model.name} has no layer between the first and the last to find bits "
            "for; give --bits a number"
        )
    pictures = list(job.calibration_images(most=PICTURES))
    found = measure_sensitivity(job.model, job.plan, names, wanted.kinds, pictures, journal)
    weights = sum(layer.parameters for layer in found)
    if wanted.max_bytes is None:
        assert wanted.average_bits is not None
        chosen = allocate(found, wanted.average_bits * weights)
    else:
        chosen = _within(job, found, wanted.max_bytes, pictures[0][:8])
    rows = _rows(found, chosen)
    journal.say(as_text(sensitivity_table(rows, average_bits(found, chosen))))
    if folder is not None:
        write_png(draw_sensitivity(rows), folder.sensitivity_plot)
        write_csv(folder.sensitivity, rows)
    return job._replace(plan=_planned(job.plan, chosen))


def _planned(plan: Plan, chosen: Mapping[str, int]) -> Plan:
    layers = [
        replace(layer, weight_bits=chosen.get(layer.name, layer.weight_bits))
        for layer in plan.layers
    ]
    return replace(plan, layers=layers)


def _within(
    job: Job, found: list[Sensitivity], max_bytes: int, few: torch.Tensor
) -> dict[str, int]:
    """The best widths whose file, written and weighed, is small enough.

    Args:
        job: as for `with_chosen_bits`.
        found: what the widths cost.
        max_bytes: of the ONNX file.
        few: (B, C, H, W) pictures.

    Raises:
        UsageError: none is.
    """
    weights = sum(layer.parameters for layer in found)
    once: dict[int, float] = {}
    planes: dict[int, int] = {}
    rest: dict[int, float] = {}  # by the number of planes that codes are packed into
    for bits in found[0].divergence:
        deployed = _deployed(job, {layer.name: bits for layer in found}, few)
        packed = [m for m in deployed.modules() if isinstance(m, DeployedWeight)]
        # What undoes the packing; equal tables are stored once.
        tables = {
            m.get_buffer(f"table{n}").numpy().tobytes() for m in packed for n in range(m.planes)
        }
        once[bits], planes[bits] = 8.0 * sum(map(len, tables)), max(m.planes for m in packed)
        if planes[bits] not in rest:
            rest[planes[bits]] = 8.0 * _size(job, deployed) - weights * bits - once[bits]
    common = min(rest.values())
    each = {bits: (rest[planes[bits]] - common) / len(found) for bits in planes}
    budget = 8.0 * max_bytes - common
    while True:
        try:
            chosen = allocate(found, budget, Overhead(each, once))
        except UsageError:
            least = common + min(
                weights * bits + len(found) * each[bits] + once[bits] for bits in each
            )
            raise UsageError(
                f"max_bytes {max_bytes} is too small for {job.recipe.model.name}, whose file "
                f"takes about {least / 8:.0f} bytes with the fewest bits there are; give more"
            ) from None
        over = _size(job, _deployed(job, chosen, few)) - max_bytes
        if over <= 0:
            return chosen
        budget -= 8.0 * over  # layers' names differ in length


def _deployed(job: Job, chosen: Mapping[str, int], few: torch.Tensor) -> nn.Module:
    """The network as it is exported, untrained."""
    net = convert(
        copy.deepcopy(job.model), _planned(job.plan, chosen), job.recipe.quantization.kinds
    )
    calibrate(net, [few])
    steps = (m.log_scale for m in net.modules() if isinstance(m, ActivationQuantizer))
    for number, step in enumerate(steps):  # equal ones would be one in the file
        step.data += number / 1000
    return deploy(net).cpu()


def _size(job: Job, deployed: nn.Module) -> int:
    """Bytes of the file, as it will be when training is over."""
    with TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        export_onnx(deployed, path, job.preprocessing, stored_in_onnx(job.about))
        return size_with_external_data(path) + SPARE


def _rows(found: Sequence[Sensitivity], chosen: Mapping[str, int]) -> list[dict[str, Any]]:
    """A row a layer: its width, and what every width would lose, in nats."""
    return [
        {
            "layer": layer.name,
            "parameters": layer.parameters,
            "bits": chosen[layer.name],
            **{f"nats_at_{bits}": lost for bits, lost in layer.divergence.items()},
        }
        for layer in found
    ]
