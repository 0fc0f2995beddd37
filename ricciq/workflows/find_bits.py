"""Automatic bits: choose the width of each layer's weights for a budget of bits or bytes.

What exports and plots takes a second to import, and most runs do not need it here: they give the
width themselves. So it is imported where it is used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ricciq.convert.allocation import Overhead, allocate, average_bits
from ricciq.convert.plan import Plan
from ricciq.convert.rewrite import convert
from ricciq.convert.sensitivity import (
    Sensitivity,
    estimate_sensitivity,
    measure_sensitivity,
    widths_of,
)
from ricciq.errors import UsageError
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.calibration import calibrate
from ricciq.report.terminal import as_text, sensitivity_table
from ricciq.system.files import scratch_folder
from ricciq.system.journal import Journal
from ricciq.system.tables import read_csv, write_csv
from ricciq.workflows.job import Job
from ricciq.workflows.session import Session, in_first_process

IMAGES = {"fisher": 256, "measured": 512}
"""Images that sensitivities are estimated or measured on."""
FEW = 8
"""Images to calibrate a model on whose file is only weighed."""
SPARE = 1000
"""Bytes reserved for metadata that are added after training: the accuracy."""


class Budget(NamedTuple):
    """Budget for the weights between the first and the last layer.

    Attributes:
        bits: bits of all weights together, including the overhead.
        overhead: what a file needs in addition to the codes; None if only the weights count.
        smallest: the widths of the smallest file, which fits; None if only the weights count.
        chosen: the widths that this run found before it was interrupted.
    """

    bits: float = 0.0
    overhead: Overhead | None = None
    smallest: Mapping[str, int] | None = None
    chosen: Mapping[str, int] | None = None


@in_first_process
def find_budget(job: Job, session: Session) -> Budget | None:
    """The budget of a recipe; it is checked before the sensitivities are measured.

    Args:
        job: from `prepare`.
        session: if it resumes a run that has found widths, they are kept.

    Returns:
        The budget; None if the recipe gives the width itself.

    Raises:
        UsageError: the budget is too small, or there is no layer between the first and the last.
    """
    wanted = job.recipe.quantization
    if wanted.weight_bits != "auto":
        return None
    if session.resume:
        rows = read_csv(session.folder.sensitivity, {"layer": str, "bits": int})
        if rows:
            return Budget(chosen={row["layer"]: row["bits"] for row in rows})
    weights = {
        layer.name: job.model.get_submodule(layer.name).get_parameter("weight").numel()
        for layer in job.plan.layers[1:-1]
    }
    if not weights:
        raise UsageError(
            f"{job.recipe.model.name} has no layer between the first and the last to find bits "
            "for; give --bits a number"
        )
    if wanted.max_bytes is None:
        assert wanted.average_bits is not None
        return Budget(wanted.average_bits * sum(weights.values()))
    return _weighed(job, weights, wanted.max_bytes)


def choose_bits(job: Job, budget: Budget | None, session: Session) -> Job:
    """Choose the widths of the weights that lose least within a budget.

    The first and the last layer keep the recipe's ``edge_bits``.

    Args:
        job: from `prepare`.
        budget: from `find_budget`; None leaves all widths unchanged.
        session: shows the choice, and writes sensitivity.csv and its plot if it has a folder.

    Returns:
        The job, with the chosen widths in its plan.
    """
    return job if budget is None else job._replace(plan=_chosen_plan(job, budget, session))


@in_first_process
def _chosen_plan(job: Job, budget: Budget, session: Session) -> Plan:
    if budget.chosen is not None:
        return _planned(job.plan, budget.chosen)
    found = find_sensitivity(job, session.journal)
    chosen = _allocated(job, found, budget)
    rows = _rows(found, chosen)
    session.journal.say(as_text(sensitivity_table(rows, average_bits(found, chosen))))
    if session.has_folder:
        from ricciq.report.plots import draw_sensitivity, write_png

        write_png(draw_sensitivity(rows), session.folder.sensitivity_plot)
        write_csv(session.folder.sensitivity, rows)
    return _planned(job.plan, chosen)


def find_sensitivity(job: Job, journal: Journal) -> list[Sensitivity]:
    """What each width of each layer between the first and the last costs, as the recipe wants it.

    Args:
        job: from `prepare`.
        journal: shows progress.
    """
    quantization = job.recipe.quantization
    names = [layer.name for layer in job.plan.layers[1:-1]]
    most = IMAGES[quantization.sensitivity]
    with journal.over("images", job.calibration_batches(most=most)) as read:
        batches = [images for images, _ in read]
    find = {"fisher": estimate_sensitivity, "measured": measure_sensitivity}
    return find[quantization.sensitivity](
        job.model, job.plan, names, quantization.config, batches, journal
    )


def _allocated(job: Job, found: Sequence[Sensitivity], budget: Budget) -> Mapping[str, int]:
    """The best widths within the budget. If it is one of bytes, the file is weighed."""
    largest = job.recipe.quantization.max_bytes
    if largest is None:
        return allocate(found, budget.bits)
    assert budget.smallest is not None
    bits, few = budget.bits, list(job.calibration_images(most=FEW))
    while True:
        try:
            chosen = allocate(found, bits, budget.overhead)
        except UsageError:
            return budget.smallest
        over = _size(job, _deployed(job, chosen, few)) - largest
        if over <= 0:
            return chosen
        bits -= 8.0 * over  # the overhead is an average over the layers


def _planned(plan: Plan, chosen: Mapping[str, int]) -> Plan:
    layers = [
        replace(layer, weight_bits=chosen.get(layer.name, layer.weight_bits))
        for layer in plan.layers
    ]
    return replace(plan, layers=layers)


def _weighed(job: Job, weights: Mapping[str, int], max_bytes: int) -> Budget:
    """The budget of weights for a file size, from files that are written and weighed.

    Args:
        job: from `prepare`.
        weights: number of weights of each layer.
        max_bytes: size of the ONNX file.

    Raises:
        UsageError: even the smallest file is larger.
    """
    from ricciq.deploy.modules import DeployedWeight

    whole, few = sum(weights.values()), list(job.calibration_images(most=FEW))
    once: dict[int, float] = {}
    planes: dict[int, int] = {}
    rest: dict[int, float] = {}  # by the number of bit planes of packed codes
    for bits in widths_of(job.recipe.quantization.config):
        deployed = _deployed(job, dict.fromkeys(weights, bits), few)
        packed = [m for m in deployed.modules() if isinstance(m, DeployedWeight)]
        # Lookup tables that unpack the codes; equal ones are stored once.
        tables = {
            m.get_buffer(f"table{n}").numpy().tobytes() for m in packed for n in range(m.planes)
        }
        once[bits], planes[bits] = 8.0 * sum(map(len, tables)), max(m.planes for m in packed)
        if planes[bits] not in rest:
            rest[planes[bits]] = 8.0 * _size(job, deployed) - whole * bits - once[bits]
    common = min(rest.values())
    each = {bits: (rest[planes[bits]] - common) / len(weights) for bits in planes}
    overhead = Overhead(each, once)
    alike = [Sensitivity(name, count, dict.fromkeys(each, 0.0)) for name, count in weights.items()]
    smallest = allocate(alike, math.inf, overhead)  # widths that lose the same
    least = _size(job, _deployed(job, smallest, few))
    if max_bytes < least:
        raise UsageError(
            f"max_bytes {max_bytes} is too small for {job.recipe.model.name}, whose smallest file "
            f"takes about {least} bytes; give more"
        )
    return Budget(8.0 * max_bytes - common, overhead, smallest)


def _deployed(job: Job, chosen: Mapping[str, int], few: list[torch.Tensor]) -> nn.Module:
    """The untrained network as it is exported, calibrated on a few images."""
    from ricciq.deploy.modules import deploy

    net = convert(
        copy.deepcopy(job.model), _planned(job.plan, chosen), job.recipe.quantization.config
    )
    calibrate(net, few)
    scales = (m.log_scale for m in net.modules() if isinstance(m, ActivationQuantizer))
    for number, scale in enumerate(scales):  # equal scales are stored once
        scale.data += number / 1000
    return deploy(net).cpu()


def _size(job: Job, deployed: nn.Module) -> int:
    """Bytes of the ONNX file, with room for the metadata that training adds."""
    from ricciq.deploy.export import export_onnx
    from ricciq.deploy.onnx_file import size_with_external_data

    with scratch_folder() as place:
        path = place / "model.onnx"
        export_onnx(deployed, path, job.preprocessing, job.metadata.for_onnx())
        return size_with_external_data(path) + SPARE


def _rows(found: Sequence[Sensitivity], chosen: Mapping[str, int]) -> list[dict[str, Any]]:
    """A row for each layer: its width, and the divergence of every width in nats."""
    return [
        {
            "layer": layer.name,
            "parameters": layer.parameters,
            "bits": chosen[layer.name],
            **{f"nats_at_{bits}": lost for bits, lost in layer.divergence.items()},
        }
        for layer in found
    ]
