"""Runs one file of checks with pytest, and reports every check by itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from parts import LAST_LINES, Context, Tell


class _Collector:
    """Remembers how each check ended."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.tracebacks: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.partition("::")[2]
        if report.when == "call" or not report.passed:
            self.outcomes[name] = report.outcome
            if report.failed:
                self.tracebacks[name] = report.longreprtext.splitlines()[-LAST_LINES:]
            if report.skipped:
                self.reasons[name] = str(report.longrepr[2]).removeprefix("Skipped: ")
            self.tell(self.found())

    def found(self) -> dict[str, Any]:
        """What is known so far."""
        ends = list(self.outcomes.values())
        lines = [f"{ends.count('passed')} passed, {ends.count('failed')} failed"]
        lines += [f"{name} skipped: {reason}" for name, reason in self.reasons.items()]
        for name, traceback in self.tracebacks.items():
            lines += [f"{name} failed:", *(f"    {line}" for line in traceback)]
        return {"checks": self.outcomes, "lines": lines}


def check(context: Context, tell: Tell, name: str) -> None:
    """Run ``check_NAME.py``.

    Raises:
        AssertionError: a check failed; which and why is in the log.
    """
    os.environ["RICCIQ_GPU_DEVICE"] = context.device
    file = Path(__file__).parent / f"check_{name}.py"
    seen = _Collector(tell)
    plain = ["-o", "addopts=", "-p", "no:cacheprovider", "--tb=short", "-p", "no:anyio"]
    code = pytest.main(
        [*plain, f"--basetemp={context.folder / 'pytest'}", str(file)], plugins=[seen]
    )
    tell(seen.found())
    assert code == 0, f"pytest ended with {code!s}"
