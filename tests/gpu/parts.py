"""Parts of the GPU script: each in a process of its own, with a limit, a log and a result."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

LAST_LINES = 15
"""Of a log, that are shown where a part failed."""
LEAST_SECONDS = 15
"""No part is started with less."""

Tell = Callable[[Mapping[str, Any]], None]
"""Given what a part knows so far; what it was told last counts, should there be no end."""


class MissingError(Exception):
    """Something that a part needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Context:
    """What every part is told.

    Attributes:
        device: "cuda", or "cpu" where everything is tiny.
        folder: where a part may write; large files go here.
        fashion: a folder with Fashion-MNIST's four files, if there is one.
        seconds: until the part is ended.
    """

    device: str
    folder: Path
    fashion: Path | None
    seconds: float = 0.0

    @property
    def tiny(self) -> bool:
        """Whether sizes are such that a CPU is done in seconds."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Part:
    """One part of the script.

    Attributes:
        name: in the table and in the JSON.
        work: "module:function"; the function takes the context, `Tell` and the arguments.
        limit: seconds after which it is ended.
        alone: whether it measures times, so that nothing else may run; of tiny sizes none counts.
        arguments: more that the function takes.
    """

    name: str
    work: str
    limit: float
    alone: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        status: "passed", "failed", "stopped" at its limit, or "skipped".
        reason: why, unless it passed.
        seconds: it took.
        found: what it measured; ``lines`` of it are shown.
        log: the last lines it printed, unless it passed.
    """

    status: str
    reason: str = ""
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


def processes_and_environment(device: str | None) -> tuple[BaseContext, dict[str, Any]]:
    """How parts' processes are started, and what such a process sees: versions and the card.

    They are forks of one that has imported everything, which takes ten seconds. A fork of a process
    that has used CUDA, as importing some library may, could not use it: then they are no forks.

    Args:
        device: "cuda" or "cpu"; None is cuda where there is one.

    Raises:
        RuntimeError: no process could use the device; what it said is printed.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["ricciq.workflows.quantize", "ricciq.workflows.compare"]
    )
    for method in ("forkserver", "spawn"):
        processes = multiprocessing.get_context(method)
        seen, theirs = processes.Pipe(duplex=False)  # type: ignore[attr-defined]
        trial = processes.Process(target=_see, args=(device, theirs))  # type: ignore[attr-defined]
        trial.start()
        theirs.close()
        trial.join()
        if trial.exitcode == 0:
            return processes, seen.recv()
    raise RuntimeError(f"no process can use {device or 'the device'}")


def _see(device: str | None, answers: Connection) -> None:
    import timm
    import torch

    from ricciq import __version__

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)
    card = None
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        card = {"name": about.name, "memory_gb": about.total_memory / 1e9}
    answers.send(
        {
            "ricciq": __version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "timm": timm.__version__,
            "device": device,
            "card": card,
        }
    )


class _Running:
    """A part's process."""

    def __init__(
        self, processes: BaseContext, part: Part, context: Context, seconds: float
    ) -> None:
        self.part, self.seconds = part, min(part.limit, seconds)
        self.folder = context.folder / part.name.replace(" ", "-")
        self.folder.mkdir(parents=True)
        own = Context(context.device, self.folder, context.fashion, self.seconds)
        self.started = time.monotonic()
        self.process: BaseProcess = processes.Process(target=_work, args=(part, own))  # type: ignore[attr-defined]
        self.process.start()

    @property
    def is_over(self) -> bool:
        return not self.process.is_alive() or self.took > self.seconds

    @property
    def took(self) -> float:
        return time.monotonic() - self.started

    def outcome(self) -> Outcome:
        """What the process left; one that still runs is ended, with all it started."""
        took, stopped = self.took, self.process.is_alive()
        assert self.process.pid is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # no one is left of its group
            self.process.kill()
        self.process.join()
        found = _read(self.folder / "found.json")
        end = _read(self.folder / "end.json")
        if stopped:
            end = {"status": "stopped", "reason": f"ran past its {self.seconds:.0f} s"}
        elif not end:
            reason = f"its process ended with {self.process.exitcode}"
            end = {"status": "failed", "reason": reason}
        log: list[str] = []
        if end["status"] in ("failed", "stopped"):
            log = (self.folder / "log.txt").read_text(errors="replace").splitlines()[-LAST_LINES:]
        return Outcome(**end, seconds=took, found=found, log=log)


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return values


def _work(part: Part, context: Context) -> None:
    """In the part's process: call it, and leave what it found and how it ended."""
    os.setsid()  # so that all it starts can be ended with it
    multiprocessing.set_start_method(None, force=True)  # as anywhere else, for loaders' workers
    log = (context.folder / "log.txt").open("w", buffering=1)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)

    def write(name: str, values: Mapping[str, Any]) -> None:
        written = context.folder / f"{name}.new"
        written.write_text(json.dumps(values, default=str))
        written.replace(context.folder / f"{name}.json")

    end = {"status": "passed", "reason": ""}
    module, _, function = part.work.partition(":")
    try:
        work = getattr(importlib.import_module(module), function)
        work(context, lambda values: write("found", values), **part.arguments)
    except MissingError as missing:
        end = {"status": "skipped", "reason": str(missing)}
    except BaseException as error:  # SystemExit of a command line, too
        traceback.print_exc()
        reason = " ".join(str(error).split())[:200]
        end = {"status": "failed", "reason": f"{type(error).__name__}: {reason}"}
    write("end", end)


def run_parts(
    processes: BaseContext,
    parts: Iterable[Part],
    context: Context,
    seconds: float,
    at_once: int,
    tell: Callable[[str, Outcome], None],
) -> dict[str, Outcome]:
    """Run parts in their order, so many at a time, until the time is over.

    Args:
        processes: how they are started.
        parts: the most telling first.
        context: what they are told.
        seconds: for all of them.
        at_once: how many may run together of those that need not be alone.
        tell: is called with the name and the outcome of each, as it ends.
    """
    end = time.monotonic() + seconds
    outcomes: dict[str, Outcome] = {}
    running: list[_Running] = []

    def wait_until(fewer_than: int) -> None:
        while len(running) >= fewer_than:
            for item in [item for item in running if item.is_over]:
                running.remove(item)
                outcomes[item.part.name] = item.outcome()
                tell(item.part.name, outcomes[item.part.name])
            time.sleep(0.05)

    for part in parts:
        alone = part.alone and not context.tiny
        wait_until(1 if alone else at_once)
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            outcomes[part.name] = Outcome("skipped", f"{max(left, 0):.0f} s were left")
            tell(part.name, outcomes[part.name])
            continue
        running.append(_Running(processes, part, context, left))
        if alone:
            wait_until(1)
    wait_until(1)
    return outcomes
