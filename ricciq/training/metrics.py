"""Metrics of an epoch of training: running sums, changed codes, and the rows that are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ricciq.estimators.apply import DiscreteWeight
from ricciq.evaluation import Metrics
from ricciq.runs.folder import RunFolder
from ricciq.system.distributed import World
from ricciq.system.tables import read_csv, write_csv


@dataclass
class Tally:
    """Running sums over an epoch, kept on the device.

    Attributes:
        loss: sum over images.
        hits: images whose class was predicted.
        images: images in steps with finite gradients.
        bad: steps without finite gradients, which were skipped.
        seconds: time spent on steps, before and after interruptions.
        waiting: the part of it in which the next images were not there yet.
    """

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    hits: Tensor = field(default_factory=lambda: torch.zeros(()))
    images: int = 0
    bad: int = 0
    seconds: float = 0.0
    waiting: float = 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tally:
        """Restore sums from `to_dict`; an empty mapping gives those of an epoch's start."""
        sums = {name: torch.tensor(values[name]) for name in ("loss", "hits") if name in values}
        return cls(**{**values, **sums})

    def to_dict(self) -> dict[str, Any]:
        """The sums as JSON values, exactly."""
        return {**vars(self), "loss": float(self.loss), "hits": float(self.hits)}

    def over(self, world: World) -> Tally:
        """Sums over all processes; bad steps are the same in each, times are this one's."""
        sums = torch.stack([self.loss.cpu(), self.hits.cpu()])
        loss, hits = world.total(sums)
        images = int(world.total(torch.tensor(self.images)))
        return Tally(loss, hits, images, self.bad, self.seconds, self.waiting)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Count a batch of a step with finite gradients.

        Args:
            loss: mean over the batch, a scalar.
            logits: (B, classes).
            targets: (B,) class indices, or (B, classes) shares of mixed images, of which the
                largest counts.
        """
        if targets.ndim == 2:
            targets = targets.argmax(1)
        self.loss = self.loss.to(loss.device) + loss * len(targets)
        self.hits = self.hits.to(loss.device) + (logits.argmax(1) == targets).sum()
        self.images += len(targets)

    def describe(self) -> str:
        """Loss, accuracy and speed so far, for the progress bar."""
        loss, accuracy = self.means
        return f"loss {loss:.3f}  top-1 {accuracy:.1f} %  {self.rate:.0f} images/s"

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def waiting_share(self) -> float:
        """Share of the time that was spent waiting for images."""
        return self.waiting / self.seconds if self.seconds else 0.0

    @property
    def means(self) -> tuple[float, float]:
        """Mean loss, and accuracy in percent."""
        images = max(self.images, 1)
        return float(self.loss) / images, 100 * float(self.hits) / images


class Codes(nn.Module):
    """Remembers the codes of weights, to count how many have changed.

    A state that is saved within an epoch contains its buffers.
    """

    def __init__(self, weights: list[DiscreteWeight]) -> None:
        """Remember the present codes."""
        super().__init__()
        self.weights = weights
        for index, (_, weight, quantizer) in enumerate(weights):
            places = quantizer.cells(weight).to(torch.int16)  # a codebook has up to 256
            self.register_buffer(f"places{index}", places)

    def changed_share(self) -> dict[str, float]:
        """The share of each layer's weights whose code changed since the last call."""
        shares = {}
        for index, (name, weight, quantizer) in enumerate(self.weights):
            before, now = self.get_buffer(f"places{index}"), quantizer.cells(weight)
            shares[name] = float((before != now).float().mean())
            before.copy_(now)
        return shares


@dataclass
class History:
    """The rows of the tables that training writes.

    Attributes:
        summary: of summary.csv, one for each epoch.
        geometry: of geometry.csv, one for each epoch and layer.
    """

    summary: list[dict[str, Any]] = field(default_factory=list)
    geometry: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: RunFolder, epochs: int) -> History:
        """Read the rows that an interrupted run wrote.

        Args:
            folder: of the run.
            epochs: how many epochs are finished; later rows are left out.

        Raises:
            InputError: a file is damaged.
        """

        def rows(path: Path) -> list[dict[str, Any]]:
            return [row for row in read_csv(path, {"epoch": int}) if row["epoch"] <= epochs]

        # An older version did not measure it.
        summary = [
            {**row, "waiting_share": row.get("waiting_share", "")} for row in rows(folder.summary)
        ]
        return cls(summary, rows(folder.geometry))

    def add(
        self,
        epoch: int,
        tally: Tally,
        held: Metrics,
        lr: float,
        geometry: Mapping[str, Mapping[str, float]],
        codes_changed: Mapping[str, float],
    ) -> None:
        """Append an epoch.

        Args:
            epoch: counted from 1.
            tally: sums over the training images.
            held: metrics on the hold-out.
            lr: learning rate of the last step.
            geometry: of each layer at the last step, by name.
            codes_changed: share of each layer's codes that changed, by name.
        """
        loss, accuracy = tally.means
        self.summary.append(
            {
                "epoch": epoch,
                "train_loss": loss,
                "train_top1": accuracy,
                "holdout_loss": held.loss,
                "holdout_top1": held.top1,
                "lr": lr,
                "images_per_second": tally.rate,
                "skipped_steps": tally.bad,
                "waiting_share": tally.waiting_share,
            }
        )
        for name, measured in geometry.items():
            row = {"epoch": epoch, "layer": name, **measured}
            self.geometry.append({**row, "codes_changed": codes_changed[name]})

    def write(self, folder: RunFolder) -> None:
        """Write both files, replacing those of earlier epochs."""
        write_csv(folder.summary, self.summary)
        write_csv(folder.geometry, self.geometry)

    def describe(self, epochs: int) -> str:
        """The last epoch in one line; ``epochs`` is how many there will be."""
        row = self.summary[-1]
        skipped = f", {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
        waiting = f", waiting for images {row['waiting_share']:.0%}".replace("%", " %")
        return (
            f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f}  "
            f"train top-1 {row['train_top1']:.1f} %  hold-out top-1 {row['holdout_top1']:.1f} %  "
            f"{row['images_per_second']:.0f} images/s{waiting}{skipped}"
        )
