"""Several processes of one run, as `torchrun` starts them; a process alone is a world of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ricciq.errors import RicciqError, UsageError

PATIENCE = timedelta(hours=12)
"""How long the others wait for the first, which alone evaluates, exports and reports."""
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train together, each with its own share of every batch.

    Attributes:
        rank: of this process, counted from 0; the first alone writes and speaks.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, handed to all of them; so is the error if it cannot."""
        if self.size == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = make()
            except (RicciqError, KeyboardInterrupt) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[1], RicciqError):
            outcome[1].said = not self.is_first
        if outcome[1] is not None:
            raise outcome[1]
        made: T = outcome[0]
        return made

    def share(self, tensor: Tensor) -> None:
        """Overwrite a tensor by that of the first process."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def gather(self, value: T) -> list[T]:
        """The value of each process, to all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return flag
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes of a tensor, of one shape in all of them."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value


def process_number(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which process `torchrun` says this is, counted from 0, and of how many."""
    return int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))


def local_device(name: str, environment: Mapping[str, str] = os.environ) -> str:
    """The device a process takes where each has one of its own: ``cuda`` becomes ``cuda:1``.

    Raises:
        UsageError: several processes were given one and the same GPU.
    """
    _, size = process_number(environment)
    if size == 1:
        return name
    if name.startswith("cuda:"):
        raise UsageError(
            f"--device {name} is one device for {size} processes; give "
            "--device cuda, of which each takes its own"
        )
    on_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return f"cuda:{environment.get('LOCAL_RANK', '0')}" if on_gpu else "cpu"


@contextmanager
def joined(device: torch.device, environment: Mapping[str, str] = os.environ) -> Iterator[World]:
    """The world that `torchrun` describes in the environment, for the length of a block."""
    if process_number(environment)[1] == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
