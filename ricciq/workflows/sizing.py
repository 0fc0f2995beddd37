"""What a run will need: steps, bytes, memory, and the batch size that fits."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace
from typing import Any

import torch

from ricciq.convert.rewrite import convert
from ricciq.errors import is_out_of_memory
from ricciq.quant.grid import count_codes
from ricciq.system.distributed import World, process_number
from ricciq.training.memory import (
    StepMemory,
    free_memory,
    halve_until,
    largest_batch,
    step_memory,
)
from ricciq.training.step import Trainer
from ricciq.workflows.job import Job, is_distilled


def describe(job: Job) -> dict[str, Any]:
    """Describe a run that has not started, as plain values; sizes and memory in bytes.

    Memory is as far as it can be counted beforehand, see `ricciq.training.memory.StepMemory`.
    """
    settings = job.recipe.training
    layers: list[dict[str, Any]] = []
    for layer in job.plan.layers:
        module = job.model.get_submodule(layer.name)
        parameters = sum(p.numel() for p in module.parameters(recurse=False))
        layers.append(
            {
                "name": layer.name,
                "weight_bits": layer.weight_bits,
                "act_bits": layer.act_bits,
                "parameters": parameters,
                "bytes": math.ceil(parameters * math.log2(count_codes(layer.weight_bits)) / 8),
            }
        )
    discrete = sum(layer["parameters"] for layer in layers)
    whole = sum(p.numel() for p in job.model.parameters())
    _, memory = _trial(job)
    batch_size = batch_size_for(job, memory)
    world = World(0, process_number()[1])
    batches = len(job.loader("fit", training=True, batch_size=batch_size, world=world))
    return {
        "model": job.recipe.model.name,
        "data": job.recipe.data.name,
        "device": str(job.device),
        "float_epochs": job.float_epochs,
        "epochs": settings.epochs,
        "steps": settings.epochs * math.ceil(batches / settings.grad_accum_steps),
        "batch_size": batch_size,
        "float_bytes": 4 * whole,
        "bytes": sum(layer["bytes"] for layer in layers) + 4 * (whole - discrete),
        "training_memory": memory.bytes(batch_size),
        "layers": layers,
        "kept": [asdict(kept) for kept in job.plan.kept],
        "recipe": job.recipe.model_dump(mode="json"),
    }


def find_batch_size(job: Job) -> int:
    """The largest power of two that fits into memory; `ricciq.training.memory` has a limit.

    Returns:
        The batch size; 0 if not even a trainer fits.
    """
    try:
        trainer, memory = _trial(job)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return 0
        raise
    shape = job.preprocessing.input_size

    def fits(size: int) -> bool:
        return trainer.fits((torch.zeros(size, *shape), torch.zeros(size, dtype=torch.long)))

    return halve_until(fits, batch_size_for(job, memory))


def _trial(job: Job) -> tuple[Trainer, StepMemory]:
    """A trainer of a converted copy of a job's model, and the memory of its steps."""
    recipe = job.recipe
    model = copy.deepcopy(job.model)
    # The values of the scales do not matter here.
    convert(model, job.plan, replace(recipe.quantization.config, search=1))
    teacher = job.model.eval() if is_distilled(job) else None
    trainer = Trainer(model, recipe, job.correction, job.device, 1, teacher)
    images = torch.zeros(2, *job.preprocessing.input_size, device=job.device)
    with torch.autocast(job.device.type, trainer.dtype, enabled=trainer.amp):
        return trainer, step_memory(model, images, teacher, trainer.moments)


def batch_size_for(job: Job, memory: StepMemory) -> int:
    """The recipe's batch size; if it is "auto", what should fit into the free memory.

    Args:
        job: from `prepare`.
        memory: of a step, by batch size.
    """
    wanted = job.recipe.data.batch_size
    if wanted != "auto":
        return wanted
    _, processes = process_number()
    free = free_memory(job.device)
    size = largest_batch(memory, free if job.device.type == "cuda" else free // processes)
    images = job.count("fit") // processes
    return halve_until(lambda size: size <= max(images, 1), size)
