"""The keys of a recipe with type, default and description, from its JSON schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ricciq.errors import UsageError, did_you_mean
from ricciq.recipe import Recipe

Schema = Mapping[str, Any]


def recipe_keys(section: str | None = None) -> list[dict[str, Any]]:
    """The keys of a recipe, or of one section.

    Args:
        section: such as ``training`` or ``data.augmentation``; None for all keys.

    Returns:
        A row for each key: dotted name, type, default, and description.

    Raises:
        UsageError: there is no such section.
    """
    schema = Recipe.model_json_schema()
    rows = list(_rows(schema, schema["$defs"], ""))
    if section is None:
        return rows
    found = [row for row in rows if row["key"].startswith(f"{section}.")]
    if not found:
        parents = {row["key"].rpartition(".")[0] for row in rows} - {""}
        hint = did_you_mean(section, sorted(parents), f"give one of {', '.join(sorted(parents))}")
        raise UsageError(f"a recipe has no section {section}; {hint}")
    return found


def _rows(schema: Schema, sections: Schema, prefix: str) -> Iterator[dict[str, Any]]:
    for name, key in schema["properties"].items():
        if "$ref" in key:
            inner = sections[key["$ref"].rpartition("/")[2]]
            yield from _rows(inner, sections, f"{prefix}{name}.")
            continue
        yield {
            "key": f"{prefix}{name}",
            "type": _type(key),
            "default": key["default"],
            "description": key.get("description", ""),
        }


def _type(key: Schema) -> str:
    """A type in words: ``integer >= 1``, ``lsq | odd``, ``list of integer 2 to 8``."""
    if "enum" in key:
        return " | ".join(str(value) for value in key["enum"])
    if "const" in key:
        return str(key["const"])
    if "pattern" in key and "\\d*\\.?\\d+" in key["pattern"]:  # pydantic's ByteSize
        return "size, such as 4MB"
    if "anyOf" in key:
        kinds = [_type(kind) for kind in key["anyOf"] if kind.get("type") != "null"]
        return kinds[0] if kinds[0].startswith("size") else " | ".join(dict.fromkeys(kinds))
    if key["type"] == "array":
        if "prefixItems" in key:
            return f"{len(key['prefixItems'])} of {_type(key['prefixItems'][0])}"
        return f"list of {_type(key['items'])}"
    if key.get("format") == "path":
        return "path"
    return f"{key['type']}{_bounds(key)}"


def _bounds(key: Schema) -> str:
    low, high = key.get("minimum"), key.get("maximum")
    if low is not None and high is not None:
        return f" {low:g} to {high:g}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    # Bounds like that of the seed, 2**63 - 1, do not help a reader.
    found = [
        f"{sign} {key[name]:g}" for name, sign in signs.items() if abs(key.get(name, 1e9)) < 1e9
    ]
    return f" {', '.join(found)}" if found else ""
