"""What a training step needs of memory, how much there is, and the batch size that fits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

LARGEST_BATCH = 256
"""The most pictures that a search for the batch size tries: rates are not scaled to more."""
RESERVE = 0.5
"""The share of free memory that a search starts from. A process was seen to grow by 1.6 times what
can be counted: gradients on their way, and what kernels work in."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step, as far as they can be counted beforehand.

    Attributes:
        fixed: weights, their gradients, the optimizer's moments, and the teacher's weights.
        per_picture: what the forward pass keeps for the backward pass.
    """

    fixed: int
    per_picture: int

    def bytes(self, batch_size: int) -> int:
        """Of a step with so many pictures."""
        return self.fixed + batch_size * self.per_picture


def step_memory(
    model: nn.Module, images: Tensor, teacher: nn.Module | None, moments: int
) -> StepMemory:
    """Count what a forward pass in training keeps, by running it.

    What does not depend on the pictures, such as the discrete weights, counts as fixed.

    Args:
        model: a converted model; its BatchNorm averages take the pictures in.
        images: (B, C, H, W) of an even number of pictures on the model's device.
        teacher: the float model, if there is one.
        moments: tensors of its size that the optimizer keeps for a weight.
    """
    half = len(images) // 2
    whole, part = _kept(model, images), _kept(model, images[:half].clone())
    per_picture = (whole - part) // half
    fixed = _weight_bytes(model) * (2 + moments) + whole - per_picture * len(images)
    return StepMemory(fixed + (0 if teacher is None else _weight_bytes(teacher)), per_picture)


def _kept(model: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass in training keeps beside the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        answer = model.train()(images)  # alive until the counting is done, and with it what it kept
    del answer
    return sum(kept.values())


def _weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take: of the GPU, or of the machine and its limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [psutil.virtual_memory().available]
    with suppress(OSError, ValueError):  # a container may have no limit
        limit = int((CGROUP / "memory.max").read_text())
        free.append(limit - int((CGROUP / "memory.current").read_text()))
    return max(min(free), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is torch's way to say that there is not enough memory, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "could not create a primitive" in text
    )


def halve_until(fits: Callable[[int], bool], size: int) -> int:
    """The first of size, size / 2, and so on that fits; 0 if not even one picture does."""
    while size and not fits(size):
        size //= 2
    return size


def largest_batch(memory: StepMemory, free: int) -> int:
    """The largest power of two up to `LARGEST_BATCH` that should fit; 1 at least."""
    size = halve_until(lambda size: memory.bytes(size) <= RESERVE * free, LARGEST_BATCH)
    return max(size, 1)
