"""Which output of a network stands for which class: class maps, and timm's lists of ImageNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ricciq.errors import DataError, on_one_line

MOST_BYTES = 10_000_000
"""Size of the largest class map that is read; 21,841 names have less than 1 MB."""


def printable_name(name: str) -> str:
    """The name of a class without invalid UTF-8, which neither JSON nor HTML can hold."""
    return name.encode(errors="backslashreplace").decode()


def unnamed(number: int) -> str:
    """What an output without a name is called, as hardly any folder is.

    Args:
        number: of the output, from 0.
    """
    return f"#{number}"


def imagenet_synsets(count: int) -> list[str] | None:
    """The WordNet synsets, such as n01440764, of a network with so many outputs.

    Args:
        count: number of outputs; each of timm's variants of ImageNet has another one.

    Returns:
        One for each output, in timm's order; None for any other number.
    """
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    return list(ImageNetInfo(subset).label_names())  # type: ignore[no-untyped-call]


class ClassMap(NamedTuple):
    """The names of outputs, from a file.

    Attributes:
        path: the file.
        names: by the number of the output, from 0.
    """

    path: Path
    names: dict[int, str]

    @property
    def is_complete(self) -> bool:
        """Whether it has no gaps, so that its size is the number of outputs."""
        return max(self.names) == len(self.names) - 1

    def outputs(self, count: int) -> list[str]:
        """The names of a network's outputs; see `unnamed` for those without a name.

        Args:
            count: number of outputs.

        Raises:
            DataError: the map names outputs that the network does not have.
        """
        if (last := max(self.names)) >= count:
            raise DataError(
                f"class map {self.path} has {self.names[last]!r} as class {last}, but the model "
                f"has {count} classes, from 0; give the class map of this model"
            )
        return [self.names.get(number, unnamed(number)) for number in range(count)]


def read_class_map(path: Path) -> ClassMap:
    """Read a class map, as timm's --class-map.

    Args:
        path: a text file with the name of a class in each line, in the order of the outputs; or a
            .json file with such a list, or an object of names and numbers.

    Raises:
        DataError: the file is missing, a pickle, or is invalid.
    """
    if path.suffix.lower() in (".pkl", ".pickle"):
        raise DataError(
            f"class map {path} is a pickle, which could run code; write it as a .txt file with a "
            "name in each line"
        )
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("it is larger than 10 MB")
        # Names of folders may be invalid UTF-8, too.
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        pairs = _in_json(text) if path.suffix.lower() == ".json" else _in_lines(text)
        return ClassMap(path, _by_number(pairs))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"class map {path} cannot be read ({on_one_line(error, 160)}); give a text file with "
            "the name of a class in each line, in the order of the model's outputs"
        ) from None


def _in_lines(text: str) -> list[tuple[str, Any]]:
    lines = text.rstrip().split("\n")
    return [(line.strip(), number) for number, line in enumerate(lines)]


def _in_json(text: str) -> list[tuple[str, Any]]:
    """Names and numbers of a list, of {name: number}, or of {number: name}."""
    values = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    if not isinstance(values, list):
        raise ValueError("it has no list or object of names")
    if all(isinstance(value, str) for value in values):
        return [(name, number) for number, name in enumerate(values)]
    if not all(isinstance(pair, tuple) for pair in values):
        raise ValueError("it has a list of other things than names")
    if all(isinstance(value, str) and key.isdecimal() for key, value in values):
        return [(name, int(key)) for key, name in values]
    return values


def _by_number(pairs: list[tuple[str, Any]]) -> dict[int, str]:
    """The names by number.

    Raises:
        ValueError: there is none, or a name or a number is invalid or there twice.
    """
    names: dict[int, str] = {}
    known: set[str] = set()
    for name, number in pairs:
        if not name:
            raise ValueError(f"line {number + 1} is empty")
        if type(number) is not int or number < 0:
            raise ValueError(f"{name!r} has {number!r} instead of a number")
        if name in known or number in names:
            raise ValueError(f"{name!r} or its number {number} is there twice")
        known.add(name)
        names[number] = printable_name(name)
    if not names:
        raise ValueError("it is empty")
    return names
