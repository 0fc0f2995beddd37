"""The processes of one run, as `torchrun` starts them; a single process is a world of size 1."""

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
"""How long the other processes wait for the first, which alone evaluates, exports and reports."""
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train together, each with its own share of every batch.

    Attributes:
        rank: of this process, from 0; only the first process writes files and prints.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """Call a function in the first process, and return its result in every process.

        Raises:
            RicciqError: the call raised it in the first process; every process raises it.
            KeyboardInterrupt: likewise.
        """
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
        """Overwrite a tensor with that of the first process."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        if self.size == 1:
            return flag
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes; its shape is the same in all of them."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value


def process_number(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """The rank of this process, from 0, and the number of processes, as `torchrun` sets them."""
    return int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))


def local_device(name: str, environment: Mapping[str, str] = os.environ) -> str:
    """The device of this process: with several processes, ``cuda`` becomes ``cuda:1`` and so on.

    Args:
        name: the value of --device.
        environment: variables that `torchrun` sets.

    Raises:
        UsageError: several processes were given the same GPU.
    """
    _, size = process_number(environment)
    if size == 1:
        return name
    if name.startswith("cuda:"):
        raise UsageError(
            f"--device {name} is one device for {size} processes; give --device cuda, so that "
            "each process uses its own"
        )
    on_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return f"cuda:{environment.get('LOCAL_RANK', '0')}" if on_gpu else "cpu"


@contextmanager
def joined(device: torch.device, environment: Mapping[str, str] = os.environ) -> Iterator[World]:
    """Join the process group that `torchrun` describes, for the duration of a block.

    Args:
        device: of this process.
        environment: variables that `torchrun` sets.

    Yields:
        The world; of size 1 without `torchrun`.
    """
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
