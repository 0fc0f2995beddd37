"""YAML of plain values only, with limits against hostile files."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ricciq.errors import on_one_line

MAX_CHARACTERS = 3_000
"""Longest value that is read."""
_INTEGER, _TIMESTAMP = "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Plain values only, each key once.

    Aliases are refused, since nested aliases could fill the memory; so are long values, since
    parsing a number of many digits takes hours, and NUL, which is invalid in a path. Integers are
    decimal as in YAML 1.2, so that 010 is not 8, and a date is a text.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias; write the value instead")
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if "\0" in value:
            raise yaml.YAMLError("it has a NUL character; remove it")
        if len(value) > MAX_CHARACTERS:
            raise yaml.YAMLError(f"{value[:20]}… has {len(value)} characters; shorten it")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"the mapping in line {line} has a key twice; remove one of them")
        return values


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in (_INTEGER, _TIMESTAMP)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INTEGER, re.compile("[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        ValueError: it is invalid YAML, or uses more of YAML than recipes need.
    """
    try:
        return yaml.load(text, _Loader)
    # PyYAML does not catch the errors of int(), float() and date(), nor its own AttributeError for
    # a bad !!timestamp, KeyError for a bad !!bool and IndexError for an empty !!int.
    except (
        ValueError,
        AttributeError,
        LookupError,
        ArithmeticError,
        yaml.YAMLError,
        RecursionError,
    ) as error:
        raise ValueError(on_one_line(error)) from None
