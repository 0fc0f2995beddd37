"""The tables of methods and their settings, from the catalogue of estimators.

Run as a script, it writes the README's:

python tests/support/methods_table.py
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from ricciq.estimators.catalog import CATALOG, Entry, all_settings

README = Path(__file__).parent.parent.parent / "README.md"
METHODS = "| `--method` | a gradient G at discrete values becomes | of |"
SETTINGS = "| setting under `method:` | values | default | what it is |"


def methods() -> str:
    """A row an estimator."""
    rows = [f"| `{name}` | {_line(entry)} | {entry.target} |" for name, entry in CATALOG.items()]
    return "\n".join([METHODS, "|---|---|---|", *rows])


def settings() -> str:
    """A row a setting."""
    rows = []
    for name, (_, description) in all_settings().items():
        owners = {key: one for key, one in CATALOG.items() if name in one.defaults}
        values = " or ".join(
            dict.fromkeys(one.settings.described()[name].allowed for one in owners.values())
        )
        rows.append(f"| `{name}` | {values} | {_defaults(name, owners)} | {description} |")
    return "\n".join([SETTINGS, "|---|---|---|---|", *rows])


def _line(entry: Entry) -> str:
    return f"{entry.line} (arXiv {entry.reference})" if entry.reference else entry.line


def _defaults(name: str, owners: dict[str, Entry]) -> str:
    """Each default of a setting, with the methods that have it."""
    methods = defaultdict(list)
    for key, entry in owners.items():
        value = entry.defaults[name]
        methods["none" if value is None else str(value)].append(f"`{key}`")
    return "; ".join(f"{value} ({', '.join(keys)})" for value, keys in methods.items())


def with_methods(page: str) -> str:
    """A README with the table of methods made anew."""
    return with_table(page, METHODS, methods())


def with_table(page: str, head: str, table: str) -> str:
    """A page with the table that begins with a head replaced by another."""
    before, found, rest = page.partition(head)
    if not found:
        raise ValueError(f"the page has no table that begins with {head}")
    return before + table + "\n\n" + rest.partition("\n\n")[2]


if __name__ == "__main__":
    README.write_text(with_methods(README.read_text(encoding="utf-8")), encoding="utf-8")
