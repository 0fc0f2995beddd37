"""The memory that a training step takes, the memory that is free, and the batch size that fits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from ricciq.errors import RecipeError
from ricciq.quant.weight import WeightQuantizer

LARGEST_BATCH = 256
"""The largest batch size that a search tries: learning rates are not scaled for more."""
RESERVE = 0.5
"""The share of free memory that a search plans with. Processes grew by up to 1.6 times the memory
that can be counted: the rest is gradients in flight and workspaces of kernels."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step, as far as it can be counted beforehand, in bytes.

    Attributes:
        fixed: weights, their gradients, the optimizer's moments, and the teacher's weights.
        per_image: what the forward pass keeps for the backward pass.
    """

    fixed: int
    per_image: int

    def bytes(self, batch_size: int) -> int:
        """Bytes of a step with this batch size."""
        return self.fixed + batch_size * self.per_image


def step_memory(
    model: nn.Module, images: Tensor, teacher: nn.Module | None, moments: int
) -> StepMemory:
    """Count the memory of a step by running the forward pass.

    What is kept for the discrete weights counts as fixed, and everything else for the images.

    Args:
        model: a converted model; the images enter its BatchNorm averages.
        images: (B, C, H, W), on the model's device; a BatchNorm may need two.
        teacher: the float model, if there is one.
        moments: how many tensors of its size the optimizer keeps for a weight.
    """
    for_weights, for_images = _kept(model, images)
    fixed = _weight_bytes(model) * (2 + moments) + for_weights
    if teacher is not None:
        fixed += _weight_bytes(teacher)
    return StepMemory(fixed, for_images // len(images))


def _kept(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Bytes that a forward pass in training keeps for the backward pass, without parameters.

    Returns:
        Those of the discrete weights, and all others.
    """
    parameters = {_place(p) for p in model.parameters()}
    kept: dict[int, int] = {}
    weights: dict[int, Tensor] = {}  # alive, so that no other tensor gets their place
    quantizers = [m for m in model.modules() if isinstance(m, WeightQuantizer)]
    running = 0

    def enter(*_: object) -> None:
        nonlocal running
        running += 1

    def leave(module: nn.Module, given: object, weight: Tensor) -> None:  # noqa: ARG001
        nonlocal running
        running -= 1
        weights[_place(weight)] = weight

    def note(tensor: Tensor) -> Tensor:
        place = _place(tensor)
        if place not in parameters:
            kept[place] = tensor.untyped_storage().nbytes()
            if running:
                weights[place] = tensor
        return tensor

    with ExitStack() as hooks:
        for quantizer in quantizers:
            hooks.enter_context(quantizer.register_forward_pre_hook(enter))
            hooks.enter_context(quantizer.register_forward_hook(leave))
        hooks.enter_context(torch.enable_grad())
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(note, lambda t: t))
        logits = model.train()(images)  # keeps alive what is counted
    del logits
    for_weights = sum(size for place, size in kept.items() if place in weights)
    return for_weights, sum(kept.values()) - for_weights


def _place(tensor: Tensor) -> int:
    """Where the tensor's storage begins in memory."""
    return tensor.untyped_storage().data_ptr()


def _weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still allocate: on the GPU, or within the machine's limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [psutil.virtual_memory().available]
    with suppress(OSError, ValueError):  # a container may have no limit
        limit = int((CGROUP / "memory.max").read_text())
        free.append(limit - int((CGROUP / "memory.current").read_text()))
    return max(min(free), 0)


def halve_until(fits: Callable[[int], bool], size: int) -> int:
    """The first of size, size / 2, … that fits.

    Args:
        fits: tries a batch size.
        size: the first one to try.

    Returns:
        A batch size, or 0 if not even one image fits.
    """
    while size and not fits(size):
        size //= 2
    return size


def largest_batch(memory: StepMemory, free: int) -> int:
    """The largest power of two up to `LARGEST_BATCH` that should fit.

    Args:
        memory: what a step takes.
        free: bytes that may be allocated.

    Returns:
        The batch size, at least 1.
    """
    size = halve_until(lambda size: memory.bytes(size) <= RESERVE * free, LARGEST_BATCH)
    return max(size, 1)


def recompute_activations(model: nn.Module, wanted: bool) -> None:
    """Switch timm's gradient checkpointing on or off.

    Args:
        model: a timm model.
        wanted: whether activations are recomputed in the backward pass, which saves memory.

    Raises:
        RecipeError: the model does not support it.
    """
    try:
        model.set_grad_checkpointing(wanted)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise RecipeError(
            "training.grad_checkpointing = true: this timm model does not support gradient "
            "checkpointing; set it to false and lower --batch-size"
        ) from None
