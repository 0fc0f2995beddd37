"""The sources of images that --data can name. Importing it imports none of their libraries.

To add a source, write a module with `open_source` in this package, and add an entry here. With
`open_split`, it can also open the images to evaluate on alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ricciq.errors import DataError

if TYPE_CHECKING:
    from ricciq.data.sources.base import Parts

EvaluationSplit = Literal["val", "test"]
"""Images that a model was not trained on."""


@dataclass(frozen=True)
class Source:
    """A source of images: how --data names it, and the module that opens it.

    Attributes:
        module: the module of this package whose ``open_source(name, root)`` opens it.
        form: what a user writes: a prefix followed by NAME, a word, or with ``is_path`` what the
            path must contain.
        help: a few words about it.
        root: what --data-dir means for it; empty if it ignores --data-dir.
        needs_root: whether it requires --data-dir.
        is_path: whether it is named by a path; such a source is tried last.
        is_refused: whether opening it only explains why it is not supported; help and errors leave
            it out.
    """

    module: str
    form: str
    help: str
    root: str = ""
    needs_root: bool = False
    is_path: bool = False
    is_refused: bool = False

    def takes(self, name: str) -> bool:
        """Whether a value of --data names this source."""
        if self.is_path:
            return Path(name).is_dir()
        prefix = self.form.removesuffix("NAME")
        return (
            name == prefix if prefix == self.form else name.removeprefix(prefix) not in ("", name)
        )

    def open(self, name: str, root: Path | None) -> Parts:
        """Import the module and open a data set with it.

        Args:
            name: the value of --data.
            root: the value of --data-dir.

        Returns:
            The class names and both parts.

        Raises:
            DataError: the data set is missing, unreadable or lacks a split.
        """
        module = import_module(f"ricciq.data.sources.{self.module}")
        return cast("Parts", module.open_source(name, root))

    def open_split(self, name: str, root: Path | None, split: EvaluationSplit) -> Parts:
        """Import the module and open the images to evaluate on; those of training may be missing.

        Args:
            name: the value of --data.
            root: the value of --data-dir.
            split: which images.

        Returns:
            The class names, and the images as the validation images.

        Raises:
            DataError: the data set is missing, unreadable or lacks the split.
        """
        module = import_module(f"ricciq.data.sources.{self.module}")
        if hasattr(module, "open_split"):
            return cast("Parts", module.open_split(name, split))
        if split != "val":
            raise DataError(
                f"data {name!r} has no split {split} that can be chosen; leave out --split"
            )
        return self.open(name, root)


SOURCES = (
    Source(
        "folder",
        "a folder with train/ and val/ (or valid/, validation/)",
        "images by class",
        is_path=True,
    ),
    Source("digits", "digits", "no download"),
    Source("torchvision", "torch/NAME", "torchvision", "folder", needs_root=True),
    Source("webdataset", "wds/NAME", "webdataset shards", "folder", needs_root=True),
    Source("huggingface", "hfds/NAME", "Hugging Face", "cache"),
    Source("streams", "hfids/NAME", "a stream of the datasets library", is_refused=True),
    Source("streams", "tfds/NAME", "a stream of TensorFlow", is_refused=True),
)


def find_source(name: str) -> Source | None:
    """The source that a value of --data names; None if there is no such source.

    Raises:
        OSError: the name is too long for a path.
    """
    by_name_first = sorted(SOURCES, key=lambda source: source.is_path)
    return next((source for source in by_name_first if source.takes(name)), None)


def usable() -> list[Source]:
    """The sources that open something, in the order in which help and errors list them."""
    return [source for source in SOURCES if not source.is_refused]


def forms() -> str:
    """All forms of --data, as a part of a sentence."""
    parts = []
    for needs_root, group in groupby(usable(), key=lambda source: source.needs_root):
        shown = [source.form if " " in source.form else _code(source.form) for source in group]
        parts += [f"{' or '.join(shown)} with --data-dir"] if needs_root else shown
    return f"{', '.join(parts[:-1])}, or {parts[-1]}"


def _code(form: str) -> str:
    """A word in backquotes, to tell it from the words of the sentence."""
    return form if "/" in form else f"`{form}`"


def data_help() -> str:
    """The help of --data: the form of each source, and what it is."""
    text = "; ".join(f"{source.form}: {source.help}" for source in usable())
    return f"{text[0].upper()}{text[1:]}."


def root_help() -> str:
    """The help of --data-dir: what it means for each source that uses it."""
    text = "; ".join(f"{source.root} of {source.form}" for source in usable() if source.root)
    return f"{text[0].upper()}{text[1:]}."
