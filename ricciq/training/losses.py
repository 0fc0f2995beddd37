"""The losses that training minimizes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ricciq.recipe import TrainingSection


def feature_distance(features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared distance between the directions of a student's and a teacher's features.

    As between the attention maps of Zagoruyko & Komodakis 2017 (arXiv 1612.03928, eq. 2).

    Args:
        features: (B, ...) of the model under training.
        teacher_features: same shape, of the float model.

    Returns:
        A scalar from 0 to 4.
    """
    a, b = features.float().flatten(1), teacher_features.float().flatten(1)
    return 2 - 2 * F.cosine_similarity(a, b).mean()


def loss_function(
    logits: Tensor, targets: Tensor, teacher_logits: Tensor | None, settings: TrainingSection
) -> Tensor:
    """Cross-entropy, blended with the divergence from the teacher's softened predictions.

    Args:
        logits: (B, classes) of the model under training.
        targets: (B,) class indices, or (B, classes) shares of mixed images.
        teacher_logits: (B, classes) of the float model, or None without distillation.
        settings: ``distill`` is the teacher's share, ``temperature`` softens both predictions.

    Returns:
        A scalar, in nats (Hinton et al. 2015, arXiv 1503.02531).
    """
    hard = F.cross_entropy(logits, targets, label_smoothing=settings.label_smoothing)
    if teacher_logits is None:
        return hard
    t = settings.temperature
    soft = F.kl_div(
        F.log_softmax(logits / t, 1),
        F.log_softmax(teacher_logits / t, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - settings.distill) * hard + settings.distill * t**2 * soft
