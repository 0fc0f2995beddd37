"""The order of packages: each imports only from those before it, and none has a circle inside."""

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ricciq

PACKAGE = Path(ricciq.__file__).parent
ORDER = [
    "errors _version",
    "networks",
    "evaluation system",
    "quant data",
    "layers estimators models preprocessing",
    "convert recipe",
    "runs",
    "deploy training",
    "report",
    "workflows",
    "cli",
    "__main__",
]
"""Packages on one line do not import each other. The package itself resolves names when used."""
LEVEL = {name: level for level, line in enumerate(ORDER) for name in line.split()}
LONGEST = 400
"""Lines of a module."""


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(tree: ast.AST) -> set[str]:
    """The modules that one imports, inside functions too, not those only type checkers see."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            assert node.module is not None
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = {name for name in inside if name.removeprefix("ricciq.") in MODULES}
            found |= modules or {node.module}
        found |= imports(node)
    return found


def own_imports(name: str) -> set[str]:
    """Those of this package, without its name in front."""
    used = imports(ast.parse(MODULES[name].read_text()))
    return {module.removeprefix("ricciq.") for module in used if module.startswith("ricciq.")}


@pytest.mark.parametrize("name", sorted(filter(None, MODULES)))
def test_a_package_imports_only_from_those_before_it(name):
    package = package_of(name)
    used = {package_of(module) for module in own_imports(name)} - {package}
    too_high = [other for other in used if LEVEL[other] >= LEVEL[package]]
    assert not too_high


def package_of(name):
    return name.partition(".")[0]


def test_within_a_package_there_is_no_circle():
    graphs = defaultdict(dict)
    for name in filter(None, MODULES):
        inside = {m for m in own_imports(name) if package_of(m) == package_of(name)}
        graphs[package_of(name)][name] = inside
    for graph in graphs.values():
        TopologicalSorter(graph).prepare()  # raises CycleError


def test_imports_are_found_wherever_they_stand():
    code = """
if TYPE_CHECKING:
    from ricciq.recipe import Recipe
def f():
    from ricciq.system import files, journal
    if f:
        import ricciq.errors
"""
    assert imports(ast.parse(code)) == {
        "ricciq.system.files",
        "ricciq.system.journal",
        "ricciq.errors",
    }


def test_the_paper_imports_torch_and_the_standard_library_only():
    used = {
        name.split(".")[0] for name in imports(ast.parse(MODULES["estimators.ricci"].read_text()))
    }
    assert used - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_is_long(name):
    assert len(MODULES[name].read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("name", ["ricciq", "ricciq.cli", "ricciq.recipe"])
def test_importing_the_command_does_not_import_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
