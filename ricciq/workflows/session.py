"""The session of a run: device, processes, random state, journal and folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from ricciq.errors import FolderTakenError, InterruptedRunError, UsageError
from ricciq.recipe import Recipe
from ricciq.runs.folder import RunFolder, choose_run_folder
from ricciq.system.distributed import World, joined, local_device
from ricciq.system.journal import Journal

P = ParamSpec("P")
T = TypeVar("T")


class Session:
    """What a run works with. Only the first process prints and writes.

    `Session.open` makes the session of a run or a study. A session made directly is one process
    without a lock; without a folder it can only plan.

    Args:
        device: where to compute.
        journal: shows progress; by default nothing is shown.
        world: the processes that train together; by default this one.
        folder: what the run writes to, from `begin` on.
        resume: continue the run in the folder.
        check: called with the folder's path once it is locked; it raises an error if the folder
            cannot be used any more.
        instead: chooses another folder then, if the user named none.

    Attributes:
        begun: whether `begin` was called, so the run can be resumed.
        seconds: what each function took that ran `in_first_process`, by its name.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        journal: Journal | None = None,
        world: World | None = None,
        folder: RunFolder | None = None,
        resume: bool = False,
        check: Callable[[Path], object] | None = None,
        instead: Callable[[], RunFolder] | None = None,
    ) -> None:
        self.device = device
        self.journal = journal or Journal()
        self.world = world or World()
        self.resume = resume
        self.begun = False
        self.seconds: dict[str, float] = {}
        self._folder, self._check, self._instead = folder, check, instead
        self._held = ExitStack()

    @classmethod
    @contextmanager
    def open(
        cls,
        recipe: Recipe,
        output: Path | None = None,
        *,
        kind: type[RunFolder] = RunFolder,
        resume: bool = False,
        overwrite: bool = False,
        journal: Journal | None = None,
    ) -> Iterator[Session]:
        """Open the session of a run or a study. The folder is written to from `begin` on.

        Args:
            recipe: gives the device and the seed.
            output: the folder; by default a new one under ``runs``.
            kind: folder of a run, or of a study.
            resume: continue the run in the folder, which must have the same recipe.
            overwrite: replace the run in the folder.
            journal: shows progress; by default nothing is shown.

        Yields:
            The session. At its end the lock is released, the random state is restored, and the
            process group is left.

        Raises:
            UsageError: the device or the folder cannot be used.
            InterruptedRunError: the user stopped the run after `begin`.
        """
        device = choose_device(recipe.device)
        choose = partial(choose_run_folder, recipe, resume=resume, overwrite=overwrite, kind=kind)
        with joined(device) as world, random_state(device, recipe.seed):
            folder = kind(world.from_first(lambda: choose(output).path))
            session = cls(
                device,
                journal=journal if world.is_first else None,
                world=world,
                folder=folder,
                resume=resume,
                check=choose,
                instead=partial(choose, None) if output is None and not resume else None,
            )
            with session._held:
                try:
                    yield session
                except KeyboardInterrupt:
                    if not session.begun:
                        raise
                    stopped = InterruptedRunError(
                        f"stopped; `--output {session.folder.path} --resume` continues from the "
                        "last saved state"
                    )
                    stopped.said = not world.is_first
                    raise stopped from None

    @contextmanager
    def trial(self, recipe: Recipe, folder: RunFolder) -> Iterator[Session]:
        """The session of one run of a study, with its own random state.

        Args:
            recipe: of the run, which is resumed if the folder has the same recipe.
            folder: of the run.
        """
        resume = folder.is_ours and folder.load_recipe().gives_the_run_of(recipe)
        session = Session(self.device, journal=self.journal, folder=folder, resume=resume)
        with random_state(self.device, recipe.seed), session._held:
            yield session

    @property
    def has_folder(self) -> bool:
        """Whether this session has a folder to write to."""
        return self._folder is not None

    @property
    def folder(self) -> RunFolder:
        """The folder that this session writes to.

        Raises:
            ValueError: the session has no folder.
        """
        if self._folder is None:
            raise ValueError("this session has no folder; give one to Session")
        return self._folder

    def begin(self, recipe: Recipe, announcement: str | None = None) -> None:
        """Lock the folder and write the recipe into it. From here on, the run can be resumed.

        Args:
            recipe: what the run does.
            announcement: a line that is followed by the folder's path; with it, the journal starts
                to write to the folder's log.txt.

        Raises:
            UsageError: another process has taken the folder since it was chosen.
        """

        def start() -> RunFolder:
            while not self._locked():
                pass
            if not self.resume:
                self.folder.begin(recipe)
            if announcement is not None:
                self.journal.log_to(self.folder.log)
                self.journal.say(f"{announcement} {self.folder.path}")
            return self.folder

        self._folder = self.world.from_first(start)
        self.begun = True

    def _locked(self) -> bool:
        """Lock the folder; if another process has taken it, choose the next one if we may.

        Raises:
            FolderTakenError: we may not.
            UsageError: the folder cannot be used.
        """
        try:
            with ExitStack() as held:
                held.enter_context(self.folder.locked())
                if self._check is not None:  # minutes may have passed since the folder was chosen
                    self._check(self.folder.path)
                self._held.push(held.pop_all())
        except FolderTakenError:
            if self._instead is None:
                raise
            self._folder = self._instead()
            return False
        return True


def in_first_process(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: run a function with a `Session` among its arguments in the first process only.

    All processes must call it. Each of them gets what the first one returns or raises. The session
    remembers how long it took.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        given = (*args, *kwargs.values())
        session = next(value for value in given if isinstance(value, Session))
        began = time.perf_counter()
        result = session.world.from_first(lambda: function(*args, **kwargs))
        session.seconds[function.__name__] = time.perf_counter() - began
        return result

    return call


@contextmanager
def random_state(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's random generators for the duration of the block, and restore them afterwards.

    Args:
        device: whose generator is seeded, in addition to that of the CPU.
        seed: for both.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def choose_device(name: str) -> torch.device:
    """The device that a recipe names; "auto" is CUDA if there is a GPU.

    Raises:
        UsageError: this machine has no such device.
    """
    name = local_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name} is not on this machine ({torch.cuda.device_count()} CUDA devices); "
            "give --device cpu"
        )
    return device
