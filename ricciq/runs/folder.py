"""The folder of a run: made, locked, found again, and never someone else's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from ricciq.errors import InputError, RecipeError, UsageError
from ricciq.recipe import Recipe
from ricciq.system.files import write_atomically

RUNS = Path("runs")


Folder = TypeVar("Folder", bound="RunFolder")


_LOCK = ".lock"


class RunFolder:
    """Paths inside a run's folder, and what they say about its progress."""

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
    def is_ours(self) -> bool:
        """Whether ricciq wrote this folder as one of its kind."""
        return self.recipe.is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its report."""
        return self.report.is_file()

    def load_recipe(self) -> Recipe:
        """The recipe the run was started with.

        Raises:
            InputError: the folder is not a run.
        """
        if not self.is_ours:
            raise InputError(f"{self.path} is not the folder of a run; give one that ricciq wrote")
        return Recipe.load(self.recipe)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if need be, and hold it for as long as it is written to.

        Raises:
            UsageError: it cannot be made, or another process is using it.
        """
        lock = FileLock(self.path / _LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"{self.path} is in use by another run; wait for it or choose another folder"
            ) from None
        except OSError as error:
            raise UsageError(
                f"--output {self.path} cannot be written ({error}); choose another folder"
            ) from None
        try:
            yield
        finally:
            lock.release()  # the file stays: removing it could free a lock just taken by another

    def begin(self, recipe: Recipe) -> None:
        """Remove what an earlier run wrote, and only that, and note what this one will do.

        Raises:
            UsageError: something of a run's names cannot be removed.
        """
        try:
            for path in vars(self).values():
                if path not in (self.path, self.recipe):  # what says that the folder is ours
                    path.unlink(missing_ok=True)
                if path.suffix == ".onnx":  # weights of a model over 2 GB lie beside it
                    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(
                f"--output {self.path} cannot be cleared ({error}); choose another folder"
            ) from None
        write_atomically(self.recipe, recipe.to_yaml())


class StudyFolder(RunFolder):
    """The folder of a comparison: a run's folder for each of its trials, and what they say.

    Its recipe has another name, so that neither is taken for the other. More trials can always be
    added, so it is never finished.
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
        """Never."""
        return False

    def trial(self, name: str) -> RunFolder:
        """The folder of one run of the study."""
        return RunFolder(self.path / "trials" / name)

    def begin(self, recipe: Recipe) -> None:
        """Remove what an earlier study wrote, its trials included, and only that.

        Raises:
            UsageError: as `RunFolder.begin`.
        """
        for path in (self.path / "trials").glob("*"):
            if RunFolder(path).is_ours:
                shutil.rmtree(path, ignore_errors=True)
        super().begin(recipe)


def default_folder(recipe: Recipe, now: datetime) -> Path:
    """runs/<date>-<time>-<model>-w<bits>a<bits>, as timm names its own."""
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
    """Find the folder a run may use; nothing is written yet.

    Args:
        recipe: what the run will do.
        output: where; by default a new folder, or with ``resume`` the newest unfinished one.
        resume: go on with an unfinished run of the same recipe.
        overwrite: allow a folder of ours that holds a run.
        kind: of a run, or of a study.

    Raises:
        UsageError: the folder is not ours, holds a run or the run's own source, or has nothing
            to resume.
    """
    if output is None:
        output = _newest_unfinished(recipe, kind) if resume else _new_folder(recipe, kind)
    folder = kind(output)
    try:
        if output.exists() and not output.is_dir():
            raise UsageError(f"--output {output} is a file; give a folder")
        # The lock, and what was being written, are what a run leaves that could not begin.
        occupied = output.is_dir() and any(not _is_left_over(path) for path in output.iterdir())
    except OSError as error:
        raise UsageError(
            f"--output {output} cannot be used ({error}); choose another folder"
        ) from None
    if occupied and not folder.is_ours:
        raise UsageError(
            f"--output {output} holds files that are not a run of ricciq; choose another folder"
        )
    source = recipe.model.checkpoint
    if source is not None and source.resolve().is_relative_to(output.resolve()):
        raise UsageError(
            f"--output {output} holds the float weights {source} that the run starts from; choose "
            "another folder"
        )
    if resume:
        _check_resumable(folder, recipe)
    elif occupied and not overwrite:
        remedy = "--overwrite" if folder.is_finished else "--resume or --overwrite"
        raise UsageError(f"--output {output} already holds a run; give {remedy}")
    return folder


def _is_left_over(path: Path) -> bool:
    return path.name == _LOCK or (path.name.startswith(".") and path.suffix == ".tmp")


def _new_folder(recipe: Recipe, kind: type[RunFolder]) -> Path:
    path = default_folder(recipe, datetime.now())
    return path.with_name(f"{path.name}-compare") if kind is StudyFolder else path


def _newest_unfinished(recipe: Recipe, kind: type[RunFolder]) -> Path:
    folders = [kind(path) for path in sorted(RUNS.glob("*"), reverse=True)]
    for folder in folders:
        with suppress(RecipeError):  # a damaged recipe is not this one
            if folder.is_ours and not folder.is_finished and folder.load_recipe() == recipe:
                return folder.path
    raise UsageError(f"no unfinished run of this recipe is in {RUNS}; start one without --resume")


def _check_resumable(folder: RunFolder, recipe: Recipe) -> None:
    if not folder.is_ours:
        raise UsageError(f"{folder.path} holds no run to resume; start one without --resume")
    if folder.is_finished:
        raise UsageError(f"the run in {folder.path} is finished; start another one")
    if folder.load_recipe() != recipe:
        raise UsageError(
            f"the run in {folder.path} was started with another recipe; repeat its flags or choose "
            "another --output"
        )
