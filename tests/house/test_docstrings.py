"""Docstrings name what a caller must know: arguments, fields of a dataclass, and errors.

- A public function or method with two or more arguments names each in `Args:`, and nothing else; a
  class names those of its `__init__` in its own docstring.
- A public dataclass names each field in `Attributes:`, or each field has a description of its own:
  a docstring below it, or a text in its annotation.
- A public function or method that raises an error names it, or a base of it, in `Raises:`. An error
  that the function itself catches does not count, nor does one that is raised again, nor the
  NotImplementedError of an abstract method.

An override may leave these sections to the method of the package that it overrides, and so may the
methods of a class that has all those of a protocol. A command of typer may leave them out: its
options have help texts, and its docstring is what `--help` prints.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ricciq

PACKAGE = Path(ricciq.__file__).parent
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Unit(NamedTuple):
    """A function, method or dataclass, and what its docstring has to name.

    Attributes:
        name: of it, with that of its class.
        line: where it begins.
        docstrings: its own, and those of the methods it overrides.
        arguments: what it takes.
        names: what must be named: its arguments if there are two or more, or its fields without a
            description of their own.
        errors: what it raises.
    """

    name: str
    line: int
    docstrings: list[str]
    arguments: list[str]
    names: list[str]
    errors: list[str]


class Package:
    """The classes of some modules, and what is public in them.

    Args:
        modules: their trees by name.
    """

    def __init__(self, modules: dict[str, ast.Module]) -> None:
        self.modules = modules
        self.classes = {
            node.name: node
            for tree in modules.values()
            for node in tree.body
            if isinstance(node, ast.ClassDef)
        }
        self.protocols = [n for n in self.classes.values() if "Protocol" in _base_names(n)]

    def missing(self, module: str) -> list[str]:
        """A line for each name that a docstring of a module lacks."""
        found = []
        for unit in self._units(self.modules[module]):
            place = f"{module}:{unit.line} {unit.name}"
            known = _entries(unit.docstrings, "Args") | _entries(unit.docstrings, "Attributes")
            found += [f"{place} lacks {name}" for name in unit.names if name not in known]
            stale = _entries(unit.docstrings[:1], "Args") - set(unit.arguments)
            found += [f"{place} has no {name}" for name in sorted(stale)]
            known = _entries(unit.docstrings, "Raises")
            found += [f"{place} raises {e}" for e in unit.errors if not self._bases(e) & known]
        return found

    def _units(self, tree: ast.Module) -> Iterator[Unit]:
        for node in tree.body:
            if isinstance(node, Function):
                yield from self._function(node, node.name, [ast.get_docstring(node) or ""])
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                if any("dataclass" in ast.unparse(one) for one in node.decorator_list):
                    docstring = ast.get_docstring(node) or ""
                    yield Unit(node.name, node.lineno, [docstring], [], _bare_fields(node), [])
                for method in node.body:
                    if isinstance(method, Function):
                        docstrings = list(self._docstrings(node, method.name))
                        if method.name == "__init__":
                            docstrings.insert(0, ast.get_docstring(node) or "")
                        yield from self._function(method, f"{node.name}.{method.name}", docstrings)

    def _function(self, node: Function, name: str, docstrings: list[str]) -> Iterator[Unit]:
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        is_command = any(re.search(r"\.(command|callback)\(", one) for one in decorators)
        if (node.name.startswith("_") and node.name != "__init__") or is_command:
            return
        arguments = _arguments(node)
        if "." in name and "staticmethod" not in decorators:
            arguments = arguments[1:]
        names = arguments if len(arguments) > 1 else []
        errors = sorted(set(self._raised(node.body)))
        yield Unit(name, node.lineno, docstrings, arguments, names, errors)

    def _docstrings(self, owner: ast.ClassDef, method: str) -> Iterator[str]:
        """The docstrings of a method, of all bases in the package and of its protocols."""
        for node in owner.body:
            if isinstance(node, Function) and node.name == method:
                yield ast.get_docstring(node) or ""
        bases = [self.classes[base] for base in _base_names(owner) if base in self.classes]
        kept = [p for p in self.protocols if p is not owner and _methods(p) <= self._methods(owner)]
        for base in [*bases, *kept]:
            yield from self._docstrings(base, method)

    def _methods(self, owner: ast.ClassDef) -> set[str]:
        """The methods of a class and of its bases in the package."""
        bases = [self.classes[base] for base in _base_names(owner) if base in self.classes]
        return _methods(owner).union(*map(self._methods, bases))

    def _raised(self, body: list[ast.stmt]) -> Iterator[str]:
        """The errors that leave a body, by name; `raise error` and `raise make()` are left out."""
        for node in body:
            if isinstance(node, ast.Raise) and node.exc is not None:
                error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                name = ast.unparse(error).rpartition(".")[2]
                if name[0].isupper() and name != "NotImplementedError":
                    yield name
            elif isinstance(node, ast.Try):
                caught = {name for handler in node.handlers for name in _caught(handler)}
                yield from (e for e in self._raised(node.body) if not self._bases(e) & caught)
                yield from self._raised([*node.handlers, *node.orelse, *node.finalbody])  # type: ignore[list-item]
            elif not isinstance(node, Function | ast.ClassDef):
                inner = [n for n in ast.iter_child_nodes(node) if _holds_statements(n)]
                yield from self._raised(inner)  # type: ignore[arg-type]

    def _bases(self, error: str) -> set[str]:
        """An error and all its bases, by name."""
        if error in self.classes:
            bases = [self._bases(base) for base in _base_names(self.classes[error])]
            return {error}.union(*bases)
        known = getattr(builtins, error, None)
        return {error} | {base.__name__ for base in getattr(known, "__mro__", ())}


def _holds_statements(node: ast.AST) -> bool:
    return isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case)


def _methods(node: ast.ClassDef) -> set[str]:
    methods = [n for n in node.body if isinstance(n, Function)]
    return {n.name for n in methods if "property" not in map(ast.unparse, n.decorator_list)}


def _base_names(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]


def _caught(handler: ast.ExceptHandler) -> list[str]:
    if handler.type is None:
        return ["BaseException"]
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return [ast.unparse(kind).rpartition(".")[2] for kind in kinds]


def _arguments(node: Function) -> list[str]:
    given = node.args
    named = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [argument.arg for argument in named if argument is not None]


def _bare_fields(node: ast.ClassDef) -> list[str]:
    """The fields of a dataclass that have neither a docstring nor a text in their annotation."""
    bare = []
    for here, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(here, ast.AnnAssign) or not isinstance(here.target, ast.Name):
            continue
        below = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        calls = [n for n in ast.walk(here.annotation) if isinstance(n, ast.Call)]
        texts = [text for call in calls for text in [*call.args, *(k.value for k in call.keywords)]]
        described = any(isinstance(t, ast.Constant) and isinstance(t.value, str) for t in texts)
        private = here.target.id.startswith("_") or "ClassVar" in ast.unparse(here.annotation)
        if not (below or described or private):
            bare.append(here.target.id)
    return bare


def _entries(docstrings: list[str], section: str) -> set[str]:
    """The names that a section of docstrings lists."""
    found: set[str] = set()
    for docstring in docstrings:
        for text in re.findall(rf"^{section}:\n((?:(?:    .*)?\n?)*)", docstring, re.MULTILINE):
            found |= set(re.findall(r"^    \*{0,2}(\w+):", text, re.MULTILINE))
    return found


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


SOURCES = {_name(path): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}


def test_docstrings_name_arguments_fields_and_errors() -> None:
    package = Package(SOURCES)
    missing = [line for module in sorted(SOURCES) for line in package.missing(module)]
    assert not missing, "\n".join(["docstrings lack names:", *missing])


EXAMPLE = '''
class Base:
    def take(self, a, b):
        """Take.

        Args:
            a: one.
            b: another.

        Raises:
            OSError: it is gone.
        """

class Own(Base):
    def take(self, a, b):
        """Take it from here."""
        if a:
            raise FileNotFoundError(b)

    def other(self, a, b):
        """Lacks b, and an error.

        Args:
            a: one,
                on two lines.

        Returns:
            b: nothing of the arguments.
        """
        try:
            raise KeyError(a)
        except LookupError as error:
            raise ValueError(b) from error

@dataclass
class Fields:
    """Three.

    Attributes:
        x: one.
    """

    x: int
    y: int
    """Another."""
    z: int

@app.command("go")
def go(a, b):
    """Go."""
    raise ValueError

def again(a, *, b=1, **rest):
    """Has them all.

    Args:
        a: one.
        b: another.
        **rest: the rest.
    """
    with a:
        raise b

def _private(a, b):
    raise ValueError
'''


@pytest.fixture(scope="module")
def example() -> Package:
    return Package({"example": ast.parse(EXAMPLE)})


def test_what_is_missing_is_found_and_nothing_else(example: Package) -> None:
    assert example.missing("example") == [
        "example:20 Own.other lacks b",
        "example:20 Own.other raises ValueError",
        "example:36 Fields lacks z",
    ]
