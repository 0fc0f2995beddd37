"""Optimizers and schedules, from timm's factories."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from ricciq.errors import RecipeError
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.weight import WeightQuantizer
from ricciq.recipe import TrainingSection


class Featured(NamedTuple):
    """What a model with features returns.

    Attributes:
        logits: (B, classes).
        features: (B, ...).
    """

    logits: Tensor
    features: Tensor


class WithFeatures(nn.Module):
    """A timm model that also returns its features, the input of its head.

    Args:
        model: a model with ``forward_features`` and ``forward_head``.

    Raises:
        RecipeError: the model has no such methods.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
            raise RecipeError(
                f"training.distill_features needs the features of the model, which "
                f"{type(model).__name__} does not provide; remove it"
            )
        self.model = model

    def forward(self, x: Tensor) -> Featured:
        """Logits (B, classes) and features (B, ...) of images (B, C, H, W)."""
        features = self.model.forward_features(x)  # type: ignore[operator]
        return Featured(self.model.forward_head(features), features)  # type: ignore[operator]


def optimizer_and_schedule(
    model: nn.Module, settings: TrainingSection, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Make the optimizer and the schedule with timm's factories.

    One-dimensional parameters (scales, biases, BatchNorm) have no weight decay. The fused form of
    an optimizer is used if torch has one.

    Args:
        model: whose parameters are optimized.
        settings: optimizer, schedule and their values.
        updates_per_epoch: optimizer steps in an epoch.

    Raises:
        RecipeError: timm has no such optimizer or schedule, or it cannot be used.
    """
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.scale_lr != 1:
        options["param_group_fn"] = partial(_groups, settings=settings)
    try:
        optimizer = create_optimizer_v2(model, opt=settings.opt, **options)
        if "fused" in optimizer.defaults:
            optimizer = create_optimizer_v2(model, opt=settings.opt, fused=True, **options)
    # timm asserts that CUDA, APEX or bitsandbytes is available for the optimizers that need it.
    except (ValueError, AssertionError, ImportError) as error:
        raise RecipeError(
            f"training.opt = {settings.opt} cannot be used ({error}); choose sgd or adamw"
        ) from None
    if getattr(optimizer, "is_second_order", False):
        raise RecipeError(
            f"training.opt = {settings.opt} needs second derivatives; choose sgd or adamw"
        )
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=settings.sched,
            num_epochs=max(settings.epochs, 1),
            warmup_epochs=settings.warmup_epochs,
            min_lr=settings.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise RecipeError(
            f"training.sched = {settings.sched} cannot be used ({error}); choose cosine"
        ) from None
    if schedule is None:
        raise RecipeError(
            f"training.sched = {settings.sched} is not a schedule of timm; choose cosine"
        )
    return optimizer, schedule


def _groups(model: nn.Module, settings: TrainingSection) -> list[dict[str, Any]]:
    """timm's parameter groups, and one for the scales with its own learning rate."""
    quantizers = (
        m for m in model.modules() if isinstance(m, WeightQuantizer | ActivationQuantizer)
    )
    scales = {id(m.log_scale): m.log_scale for m in quantizers if m.log_scale.requires_grad}
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=exempt)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in scales]
    last = {"params": list(scales.values()), "weight_decay": 0.0, "lr_scale": settings.scale_lr}
    return [group for group in [*groups, last] if group["params"]]


def check_training(settings: TrainingSection) -> None:
    """Check the optimizer and the schedule before any work is done.

    Raises:
        RecipeError: timm has no such optimizer or schedule, or it cannot be used.
    """
    optimizer_and_schedule(nn.Linear(1, 1), settings, updates_per_epoch=1)
