"""What an epoch of training did: its sums, the codes it changed, and the rows it is stored as."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ricciq.correction import DiscreteWeight
from ricciq.evaluate import Metrics
from ricciq.flow import Geometry
from ricciq.runfolder import RunFolder, read_csv, write_csv


@dataclass
class Tally:
    """Running sums over an epoch, kept on the device."""

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    hits: Tensor = field(default_factory=lambda: torch.zeros(()))
    images: int = 0
    bad: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor, finite: bool) -> None:
        """Count a step; one without finite gradients only as bad.

        Of targets that share a mixed picture among classes, (B, classes), the largest counts.
        """
        self.bad += not finite
        if finite:
            if targets.ndim == 2:
                targets = targets.argmax(1)
            self.loss = self.loss.to(loss.device) + loss.detach() * len(targets)
            self.hits = self.hits.to(loss.device) + (logits.argmax(1) == targets).sum()
            self.images += len(targets)

    def describe(self) -> str:
        """Loss, accuracy and speed so far, for the progress bar."""
        loss, accuracy = self.means
        rate = self.images / (time.perf_counter() - self.started)
        return f"loss {loss:.3f}  top-1 {accuracy:.1f} %  {rate:.0f} images/s"

    @property
    def means(self) -> tuple[float, float]:
        """Mean loss, and accuracy in percent."""
        images = max(self.images, 1)
        return float(self.loss) / images, 100 * float(self.hits) / images


class Codes:
    """Remembers the weights' codes, to count how many changed since it was last asked."""

    def __init__(self, weights: list[DiscreteWeight]) -> None:
        """Take the codes of now."""
        self.weights = weights
        self.last = self._now()

    def _now(self) -> dict[str, Tensor]:
        return {name: quantizer.places(weight) for name, weight, quantizer in self.weights}

    def changed_share(self) -> dict[str, float]:
        """Of each layer's weights."""
        before, self.last = self.last, self._now()
        return {n: float((before[n] != now).float().mean()) for n, now in self.last.items()}


@dataclass
class History:
    """The rows of summary.csv (an epoch each) and geometry.csv (an epoch and layer each)."""

    summary: list[dict[str, Any]] = field(default_factory=list)
    geometry: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: RunFolder, epochs: int) -> History:
        """What an interrupted run wrote about its finished epochs."""

        def rows(path: Path) -> list[dict[str, Any]]:
            return [row for row in read_csv(path) if int(row["epoch"]) <= epochs]

        return cls(rows(folder.summary), rows(folder.geometry))

    def add(
        self,
        epoch: int,
        tally: Tally,
        held: Metrics,
        rate: float,
        lr: float,
        geometry: Mapping[str, Geometry],
        codes_changed: Mapping[str, float],
    ) -> None:
        """Append an epoch; rate is its pictures a second, lr the last step's learning rate."""
        loss, accuracy = tally.means
        self.summary.append(
            {
                "epoch": epoch,
                "train_loss": loss,
                "train_top1": accuracy,
                "holdout_loss": held.loss,
                "holdout_top1": held.top1,
                "lr": lr,
                "images_per_second": rate,
                "skipped_steps": tally.bad,
            }
        )
        for name, measured in geometry.items():
            row = {"epoch": epoch, "layer": name, **measured._asdict()}
            self.geometry.append({**row, "codes_changed": codes_changed[name]})

    def write(self, folder: RunFolder) -> None:
        """Put both files in the place of those that are there."""
        write_csv(folder.summary, self.summary)
        write_csv(folder.geometry, self.geometry)

    def describe(self, epochs: int) -> str:
        """The last epoch, of so many, on a line."""
        row = self.summary[-1]
        skipped = f", {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
        return (
            f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f}  "
            f"train top-1 {row['train_top1']:.1f} %  hold-out top-1 {row['holdout_top1']:.1f} %  "
            f"{row['images_per_second']:.0f} images/s{skipped}"
        )
