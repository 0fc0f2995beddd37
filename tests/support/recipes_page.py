"""The reference of recipes, made from code: run as a script, it writes recipes/README.md."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from methods_table import settings

from ricciq.cli.keys import recipe_keys

FILE = Path(__file__).parent.parent.parent / "recipes" / "README.md"
HEAD = """# Recipes

A recipe is a YAML file of the values that differ from the defaults, in sections: `lr: 0.004` below
`training:` sets `training.lr`. `ricciq recipes ls` lists the recipes of this folder, which
`--recipe NAME` takes by name; `ricciq recipes cp NAME mine.yaml` copies one to change. A run saves
its whole recipe as `recipe.yaml`.

The keys, as `ricciq recipes keys` prints them; `python tests/support/recipes_page.py` makes this
page:
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section, rows in groupby(recipe_keys(), key=lambda row: row["key"].rpartition(".")[0]):
        keys = list(rows)
        if section == "method":  # defaults of settings depend on the method
            keys = [row for row in keys if row["key"] in ("method.name", "method.target")]
        parts.append(f"\n**{section or 'at the top'}**\n\n" + "\n".join(_table(keys)) + "\n")
        if section == "method":
            parts.append(f"\n{settings()}\n")
    return "".join(parts)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| key | type | default | description |", "|---|---|---|---|"]
    for row in rows:
        name = row["key"].rpartition(".")[2]
        kind = row["type"].replace("|", "\\|")
        default = "" if row["default"] is None else f"`{json.dumps(row['default'])}`"
        lines.append(f"| `{name}` | {kind} | {default} | {row['description']} |")
    return lines


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
