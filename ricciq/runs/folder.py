"""The folder of a run: create, lock and find it, and refuse a folder of anything else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from ricciq.errors import FolderTakenError, InputError, RecipeError, UsageError
from ricciq.recipe import Recipe
from ricciq.system.files import write_atomically
from ricciq.system.natural_order import natural_order

RUNS = Path("runs")

Folder = TypeVar("Folder", bound="RunFolder")
_LOCK = ".lock"
SHOWN = 3
"""How many keys a message names in which two recipes differ."""


class RunFolder:
    """The paths in a run's folder, and the progress that they show."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.summary = path / "summary.csv"
        self.geometry = path / "geometry.csv"
        self.decay = path / "decay.csv"
        self.geometry_plot = path / "geometry.png"
        self.layers = path / "layers.csv"
        self.sensitivity = path / "sensitivity.csv"
        self.sensitivity_plot = path / "sensitivity.png"
        self.last = path / "last.safetensors"
        self.previous = path / "previous.safetensors"
        self.best = path / "best.safetensors"
        self.state = path / "state.json"
        self.onnx = path / "model.onnx"
        self.float_onnx = path / "float.onnx"
        self.report = path / "report.json"
        self.report_markdown = path / "report.md"
        self.page = path / "report.html"
        self.disagreements = path / "disagreements.json"
        self.log = path / "log.txt"

    @property
    def float_training(self) -> Path:
        """The folder of what trained the float model."""
        return self.path / "float"

    @property
    def is_ours(self) -> bool:
        """Whether ricciq wrote this folder, as one of this kind."""
        return self.recipe.is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the run wrote its report."""
        return self.report.is_file()

    def load_recipe(self) -> Recipe:
        """The recipe the run was started with.

        Raises:
            InputError: the folder is not that of a run.
            RecipeError: the recipe is damaged.
        """
        if not self.is_ours:
            raise InputError(
                f"{self.path} is not the folder of a run; give a folder that ricciq wrote"
            )
        return Recipe.load(self.recipe)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder if it is missing, and lock it for the duration of a block.

        Raises:
            FolderTakenError: another process uses it.
            UsageError: it cannot be created.
        """
        lock = FileLock(self.path / _LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise FolderTakenError(
                f"{self.path} is in use by another run; wait for it or choose another folder"
            ) from None
        except OSError as error:
            raise UsageError(
                f"--output {self.path} cannot be written ({error}); choose another folder"
            ) from None
        try:
            yield
        finally:
            # The file stays: removing it could free a lock that another process just took.
            lock.release()

    def begin(self, recipe: Recipe) -> None:
        """Remove the files of an earlier run, and only those, and save the recipe of this one.

        Raises:
            UsageError: a file cannot be removed.
        """
        try:
            if self.is_ours:
                shutil.rmtree(self.float_training, ignore_errors=True)
            for path in vars(self).values():
                if path not in (self.path, self.recipe):  # which shows that ricciq wrote the folder
                    path.unlink(missing_ok=True)
                if path.suffix == ".onnx":  # a model over 2 GB has its weights in another file
                    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(
                f"--output {self.path} cannot be cleared ({error}); choose another folder"
            ) from None
        write_atomically(self.recipe, recipe.to_yaml())


class StudyFolder(RunFolder):
    """The folder of a comparison: a folder for each of its runs, and their results.

    Its recipe has another file name than that of a run, to tell the two apart. Runs can always be
    added, so a study is never finished.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.recipe = path / "study.yaml"
        self.verdict = path / "compare.json"
        self.rows = path / "rows.csv"
        self.seeds_plot = path / "seeds.png"
        self.curves_plot = path / "curves.png"

    @property
    def is_finished(self) -> bool:
        """Always False."""
        return False

    def trial(self, name: str) -> RunFolder:
        """The folder of one run of the study."""
        return RunFolder(self.path / "trials" / name)

    def begin(self, recipe: Recipe) -> None:
        """Remove the files of an earlier study and its runs, and only those, and save the recipe.

        Raises:
            UsageError: as `RunFolder.begin`.
        """
        for path in (self.path / "trials").glob("*"):
            if RunFolder(path).is_ours:
                shutil.rmtree(path, ignore_errors=True)
        super().begin(recipe)


def default_folder(recipe: Recipe, now: datetime) -> Path:
    """runs/<date>-<time>-<model>-w<bits>a<bits>, in the style of timm.

    Args:
        recipe: of the run.
        now: the time in its name.
    """
    bits = recipe.quantization
    weights = "t" if bits.weight_bits == "ternary" else bits.weight_bits
    model = recipe.model.name.replace("/", "_").replace(":", "_")
    return RUNS / f"{now:%Y%m%d-%H%M%S}-{model}-w{weights}a{bits.act_bits}"


def choose_run_folder(
    recipe: Recipe,
    output: Path | None,
    *,
    resume: bool,
    overwrite: bool,
    kind: type[Folder] = RunFolder,  # type: ignore[assignment]
) -> Folder:
    """Choose the folder of a run; nothing is written yet.

    Args:
        recipe: of the run.
        output: the folder; None is a new one, or with ``resume`` the newest unfinished one.
        resume: continue an unfinished run of the same recipe.
        overwrite: allow a folder that already has a run.
        kind: `RunFolder` or `StudyFolder`.

    Returns:
        The folder.

    Raises:
        FolderTakenError: the folder has a run.
        UsageError: it has other files, or the float weights of this run, or nothing to resume.
    """
    if output is None:
        output = _newest_unfinished(recipe, kind) if resume else _new_folder(recipe, kind)
    folder = kind(output)
    try:
        if output.exists() and not output.is_dir():
            raise UsageError(f"--output {output} is a file; give a folder")
        # A run that failed to begin leaves its lock and temporary files.
        occupied = output.is_dir() and any(not _is_left_over(path) for path in output.iterdir())
    except OSError as error:
        raise UsageError(
            f"--output {output} cannot be used ({error}); choose another folder"
        ) from None
    if occupied and not folder.is_ours:
        raise UsageError(
            f"--output {output} has files that are not a run of ricciq; choose another folder"
        )
    source = recipe.model.checkpoint
    if source is not None and source.resolve().is_relative_to(output.resolve()):
        raise UsageError(
            f"--output {output} has the float weights {source} that the run starts from; choose "
            "another folder"
        )
    if resume:
        _check_resumable(folder, recipe)
    elif occupied and not overwrite:
        remedy = "--overwrite" if folder.is_finished else "--resume or --overwrite"
        raise FolderTakenError(f"--output {output} already has a run; give {remedy}")
    return folder


def _is_left_over(path: Path) -> bool:
    return path.name == _LOCK or (path.name.startswith(".") and path.suffix == ".tmp")


def _new_folder(recipe: Recipe, kind: type[RunFolder]) -> Path:
    """A folder that does not exist: of several in one second, the later ones are numbered."""
    path = default_folder(recipe, datetime.now())
    if kind is StudyFolder:
        path = path.with_name(f"{path.name}-compare")
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(free for free in chain([path], numbered) if not free.exists())


def _newest_unfinished(recipe: Recipe, kind: type[RunFolder]) -> Path:
    newest_first = sorted(RUNS.glob("*"), key=lambda path: natural_order(path.name), reverse=True)
    folders = [kind(path) for path in newest_first]
    for folder in folders:
        with suppress(RecipeError):  # a damaged recipe differs from this one
            if (
                folder.is_ours
                and not folder.is_finished
                and (folder.load_recipe().gives_the_run_of(recipe))
            ):
                return folder.path
    raise UsageError(
        f"there is no unfinished run of this recipe in {RUNS}; start one without --resume"
    )


def _check_resumable(folder: RunFolder, recipe: Recipe) -> None:
    if not folder.is_ours:
        raise UsageError(f"{folder.path} has no run to resume; start one without --resume")
    if folder.is_finished:
        raise UsageError(f"the run in {folder.path} is finished; start another run")
    if different := folder.load_recipe().differences(recipe):
        shown = [
            f"{key} was {_said(before)} and is {_said(now)}"
            for key, (before, now) in list(different.items())[:SHOWN]
        ]
        more = f", and {len(different) - SHOWN} more differ" if len(different) > SHOWN else ""
        raise UsageError(
            f"the run in {folder.path} was started with another recipe ({', '.join(shown)}{more}); "
            "give the same flags or choose another --output"
        )


def _said(value: Any) -> str:
    """A value of a recipe in a message."""
    return "not set" if value is None else str(value)
