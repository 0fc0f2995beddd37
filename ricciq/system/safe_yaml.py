"""YAML of plain values only, with limits, so that a hostile file does no harm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from ricciq.errors import on_one_line

if TYPE_CHECKING:
    pass


MAX_CHARACTERS = 3_000
"""A value longer than this is not read."""


class _Loader(yaml.SafeLoader):
    """Plain values only, each key once.

    An alias is refused, since aliases of aliases could fill the memory; so is a long value, since a
    number of many digits takes hours, and NUL, which no path has.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias; write the value out")
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if "\0" in value:
            raise yaml.YAMLError("it holds a NUL character; remove it")
        if len(value) > MAX_CHARACTERS:
            raise yaml.YAMLError(f"{value[:20]}… has {len(value)} characters; write it shorter")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"a key stands twice in what begins in line {line}; remove one")
        return values


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        ValueError: it is no YAML, or holds what a recipe has no need of.
    """
    try:
        return yaml.load(text, _Loader)
    # PyYAML lets through what int(), float() and date() raise, None where a !!timestamp is none, a
    # key that is missing where a !!bool is none, and an index where an !!int is empty.
    except (
        ValueError,
        AttributeError,
        LookupError,
        ArithmeticError,
        yaml.YAMLError,
        RecursionError,
    ) as error:
        raise ValueError(on_one_line(error)) from None
