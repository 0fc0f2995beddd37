"""What training minimizes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ricciq.recipe import TrainingSection


def feature_distance(features: Tensor, taught: Tensor) -> Tensor:
    """How far a student's features (B, ...) point elsewhere than the teacher's.

    The mean squared distance of the unit vectors, 0 to 4, as between the attention maps of
    Zagoruyko & Komodakis 2017 (arXiv 1612.03928, eq. 2).
    """
    cosine = F.cosine_similarity(features.float().flatten(1), taught.float().flatten(1))
    return 2 - 2 * cosine.mean()


def loss_function(
    logits: Tensor, targets: Tensor, teacher_logits: Tensor | None, settings: TrainingSection
) -> Tensor:
    """Cross-entropy, blended with the divergence from the float model's softened guesses.

    Args:
        logits: (B, classes) of the model under training.
        targets: (B,) class numbers, or (B, classes) shares of mixed pictures.
        teacher_logits: (B, classes) of the float model, or None without distillation.
        settings: ``distill`` is the teacher's share, ``temperature`` softens both sides.

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
