"""The floors of the package: a module imports only from floors strictly below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ricciq

PACKAGE = Path(ricciq.__file__).parent
MODULES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
# Halves where a floor of the plan holds two storeys: packing, preprocessing and runtime stand on
# errors or quantizer, train stands on trainer and that on convert. A name may be listed before
# its module exists.
FLOORS = {
    7: "__main__",
    6: "cli",
    5.5: "cookbook request",
    5: "compare",
    4: "pipeline trained",
    3.8: "preparation train",
    3.9: "autobits",
    3.5: "trainer",
    3.25: "progression sensitivity reconstruction",
    3.3: "allocation",
    3: "convert export history optimization",
    2.5: "deployment page",
    2: "disagreements oscillation layers data models runfolder report bench doctor plots",
    1.5: "correction loading folders shards options",
    1.25: "tarfiles hub torchsets completion",
    1: "recipe calibration estimators evaluate inspection pictures checkpoint",
    0.5: "nets graph packing preprocessing runtime recording",
    0.3: "quantizer",
    0.25: "modelfile flow rounding",
    0.2: "stopping",
    0.1: "distributed network",
    0: "errors grids ricci journal tables memory",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}


def imports(tree: ast.AST) -> set[str]:
    """What a module imports, inside functions too; what only type checkers see does not count."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            within = {alias.name for alias in node.names} & MODULES.keys()
            if node.module != "ricciq":
                found.add(node.module)
            elif within:  # from ricciq import pipeline; its __version__ is on no floor
                found |= {f"ricciq.{name}" for name in within}
        found |= imports(node)
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_from_floors_below(name):
    used = [
        m.split(".")[1] for m in imports(ast.parse(MODULES[name].read_text())) if "ricciq." in m
    ]
    too_high = {m: FLOOR[m] for m in used if FLOOR[m] >= FLOOR[name]}
    assert not too_high, f"{name} is on floor {FLOOR[name]}"


def test_imports_are_found_wherever_they_stand():
    code = """
if TYPE_CHECKING:
    from ricciq.train import finetune
def f():
    from ricciq import __version__, pipeline
    if f:
        import ricciq.data
"""
    assert imports(ast.parse(code)) == {"ricciq.pipeline", "ricciq.data"}


def test_the_paper_imports_torch_and_the_standard_library_only():
    used = {name.split(".")[0] for name in imports(ast.parse(MODULES["ricci"].read_text()))}
    assert used - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("name", [*sorted(MODULES), "__init__"])
def test_no_module_is_long(name):
    assert len((PACKAGE / f"{name}.py").read_text().splitlines()) < 450


@pytest.mark.parametrize("name", ["ricciq", "ricciq.cli", "ricciq.recipe"])
def test_importing_the_command_does_not_import_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
