"""What a run says while it works: to the terminal, and to log.txt once there is a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

LINE_SECONDS = 60.0
"""How often a bar says a line where it cannot be drawn."""


class Journal:
    """Says a line at a time, and shows a bar where there is a terminal.

    Args:
        console: where to show; None keeps silent and only logs.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self._log: Path | None = None
        self._pending: list[str] = []

    def say(self, text: str) -> None:
        """Show a line and log it with the time."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._pending.append(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")
        if self._log is None:
            return
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.writelines(self._pending)
        except OSError as error:  # what matters more cannot be written either, and will say so
            self._log = None
            self.say(f"{error.filename} cannot be written ({error.strerror}); it ends here")
        self._pending.clear()

    def log_to(self, path: Path) -> None:
        """Append to this file from now on, beginning with what was said before."""
        self._log = path

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[Callable[[], str]], None]]:
        """A progress bar for the length of a block; a line a minute where it cannot be drawn.

        Yields:
            A function to call after each of ``total`` steps; its argument gives the text to show
            and is called now and then, since making it may wait for the device.
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
            # In a narrow terminal this gives way, and the others stay whole.
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

    def _lines(self, title: str, total: int) -> Callable[[Callable[[], str]], None]:
        """What `bar` yields where only lines can be shown."""
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
