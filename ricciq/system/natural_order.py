"""Names in the order people mean: 9 before 10."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\d+")


def natural_order(name: str) -> tuple[str, str]:
    """A key to sort names as timm does, 9 before 10; equal ones are sorted by the name itself.

    timm's own key is a list of strings and numbers, which takes twice as long to make and compare.
    """
    return _NUMBER.sub(_by_value, name.lower()), name


def _by_value(number: re.Match[str]) -> str:
    """A number such that strings with it are in the order of its value, before any other text."""
    digits = str(int(number[0]))
    return f"\0{chr(len(digits))}{digits}"
