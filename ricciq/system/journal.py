"""Messages and progress of a run: on the terminal, and in log.txt once the run has a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from operator import length_hint
from pathlib import Path
from time import monotonic
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

T = TypeVar("T")
LINE_SECONDS = 60.0
"""Seconds between lines where a progress bar cannot be drawn."""


class Journal:
    """Prints and logs messages, and shows progress bars on a terminal.

    Args:
        console: where to print; None only logs.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self._log: Path | None = None
        self._pending: list[str] = []

    def say(self, text: str) -> None:
        """Print a line, and log it with the time."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._pending.append(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")
        if self._log is None:
            return
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.writelines(self._pending)
        except OSError as error:  # the run cannot write its results either, and will fail
            self._log = None
            self.say(f"{error.filename} cannot be written ({error.strerror}); the log ends here")
        self._pending.clear()

    def log_to(self, path: Path) -> None:
        """Log to this file from now on, including the messages so far."""
        self._log = path

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[Callable[[], str]], None]]:
        """Show a progress bar for the duration of a block, or a line a minute without a terminal.

        Args:
            title: text before the bar.
            total: number of steps.

        Yields:
            A function to call after each step. Its argument returns the text to show; it is called
            only for some steps, since it may wait for the device.
        """
        if self.console is None:
            yield lambda _: None
            return
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            yield self._lines(title, total)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # In a narrow terminal this column is cut, and the others are not.
            TextColumn("{task.fields[shown]}", table_column=Column(ratio=3, no_wrap=True)),
        )
        with Progress(*columns, console=self.console, transient=True, expand=True) as progress:
            task = progress.add_task(title, total=total, shown="")
            steps = 0

            def advance(text: Callable[[], str]) -> None:
                nonlocal steps
                if steps % 10 == 0:
                    progress.update(task, shown=text())
                steps += 1
                progress.advance(task)

            yield advance

    @contextmanager
    def over(self, title: str, batches: Iterable[T]) -> Iterator[Iterator[T]]:
        """Show a progress bar while batches are used in a block.

        Args:
            title: text before the bar.
            batches: what the block iterates over, once; it has a length.

        Yields:
            The batches.
        """

        def each() -> Iterator[T]:
            for batch in batches:
                yield batch
                advance(lambda: "")

        with self.bar(title, length_hint(batches)) as advance:
            yield each()

    def _lines(self, title: str, total: int) -> Callable[[Callable[[], str]], None]:
        """What `bar` yields where only lines can be printed."""
        began = said = monotonic()
        steps = 0

        def advance(text: Callable[[], str]) -> None:
            nonlocal said, steps
            steps += 1
            now = monotonic()
            if now - said >= LINE_SECONDS and steps < total:
                said = now
                left = timedelta(seconds=round((now - began) / steps * (total - steps)))
                self.say(f"{title}: {steps}/{total} {text()} {left} left")

        return advance
