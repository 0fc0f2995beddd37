"""The pace of training: what its first steps tell of the rest."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

FIRST_STEPS = 30
"""Steps after which a run says how long it will take."""


class Pace(NamedTuple):
    """What is left to train.

    Attributes:
        step_seconds: usual time of an optimizer step, in seconds.
        steps: optimizer steps that are left.
        epochs: epochs that are left, the present one included.
        of_epoch: optimizer steps of a whole epoch.
    """

    step_seconds: float
    steps: int
    epochs: int
    of_epoch: int

    @classmethod
    def of_epochs(cls, step_seconds: float, epochs: int, of_epoch: int) -> Pace:
        """The pace of whole epochs.

        Args:
            step_seconds: usual time of an optimizer step, in seconds.
            epochs: how many.
            of_epoch: optimizer steps of one.
        """
        return cls(step_seconds, epochs * of_epoch, epochs, of_epoch)


class FirstSteps:
    """Times the first steps of a process, and reports their pace once.

    The first third is left out: a step is slower while kernels are chosen or compiled. Of the rest
    it is the mean, not the median: where images are loaded too slowly, several fast steps are
    followed by a wait.

    Args:
        report: called after the last of these steps. Its time does not count as training.
        count: how many steps, 2 or more.
    """

    def __init__(self, report: Callable[[Pace], None], count: int = FIRST_STEPS) -> None:
        self.report, self.count = report, count
        self.seconds: list[float] = []

    def add(self, seconds: float, steps: int, epochs: int, of_epoch: int) -> None:
        """Count a step.

        Args:
            seconds: that it took, including the wait for its images.
            steps: optimizer steps that are left.
            epochs: epochs that are left.
            of_epoch: optimizer steps of a whole epoch.
        """
        if len(self.seconds) == self.count:
            return
        self.seconds.append(seconds)
        if len(self.seconds) == self.count:
            usual = fmean(self.seconds[self.count // 3 :])
            self.report(Pace(usual, steps, epochs, of_epoch))
