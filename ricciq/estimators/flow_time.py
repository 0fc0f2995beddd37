"""The flow time and how it changes during training."""

from __future__ import annotations

import math

from ricciq.estimators.catalog import Schedule

STAGES = 64
"""Values that a slope takes while the flow time changes: it is tabulated anew for each."""


def stage(progress: float) -> int:
    """The stage, 0 to `STAGES`, at a share of training from 0 to 1."""
    return round(progress * STAGES)


def flow_time(time: float, schedule: Schedule, progress: float) -> float:
    """The flow time at a moment of training.

    Args:
        time: the nominal time, from 0.
        schedule: how it changes.
        progress: share of training that is done, from 0 to 1.

    Returns:
        From 0 to the nominal time.
    """
    if schedule == "linear":
        return time * (1 - progress)
    if schedule == "growing":
        return time * progress
    if schedule == "cosine":
        return time * (1 + math.cos(math.pi * progress)) / 2
    return time
