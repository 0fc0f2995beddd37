"""What ricciq does on a GPU: whether it is right, how fast it is, and what fails. One command.

    python tests/gpu --wheels wheels --fashion fashion --output gpu

It needs this checkout, an interpreter with torch, torchvision, timm, onnx, onnxruntime and
onnxscript, and no network. What else pyproject.toml lists and the interpreter lacks travels as
wheels, which are installed for the length of the run. Fetch them where there is a network, for the
Python and the platform of the GPU machine, and Brevitas beside them to be compared with:

    pip download --no-deps --only-binary=:all: --python-version 3.12 \
        --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 -d wheels \
        timm pydantic pydantic-core annotated-types typing-inspection \
        brevitas==0.13.4 dependencies==2.0.1 unfoldNd

Fashion-MNIST is optional: `python tests/support/fashion.py fashion` lays out the four files.

Parts run one after the other, the most telling first, each in a process of its own with a limit,
eight minutes in all (`--minutes`). What there was no time for is said, and a second call with
`--only correct main` runs the parts whose names begin so. The table and the last lines of what
failed are printed, and everything is in OUTPUT/report.json. Without a GPU, or with `--device cpu`,
sizes are tiny and times mean nothing: so CI sees that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "tests" / "benchmarks")]

from parts import (  # noqa: E402
    Context,
    Outcome,
    Part,
    processes_and_environment,
    run_parts,
)

CHECKS = ("compilation", "precision", "equality", "loading", "resuming", "export", "memory")
PARTS = (
    Part("step: resnet50", "steps:resnet50", 200, alone=True),
    Part("headline: resnet50 from JPEGs", "headline:quantize_folder", 200, alone=True),
    *(Part(f"correct: {name}", "checks:check", 150, arguments={"name": name}) for name in CHECKS),
    Part("main job: digits", "jobs:digits", 120, alone=True),
    Part("main job: time split", "jobs:split", 40, alone=True),
    Part("main job: Fashion-MNIST", "jobs:fashion", 90, alone=True),
    Part("step: mobilenetv2_100", "steps:mobilenet", 150, alone=True),
    Part("step: deit_small", "steps:deit", 150, alone=True),
    Part("cifar_resnet20", "jobs:cifar", 480, alone=True),
)
GOALS: tuple[tuple[str, str, str, str], ...] = (
    ("step: resnet50", "time_of_float", "Ricci / float, both compiled, time", "<= 1.25"),
    ("step: resnet50", "memory_of_float", "Ricci / float, both compiled, memory", "<= 1.15"),
    ("step: resnet50", "correction", "the correction's share of a step", "<= 0.03"),
    ("step: resnet50", "brevitas", "Brevitas / Ricci compiled, time", ">= 2"),
    ("step: resnet50", "waits", "waits of the host in a step", "<= 0.02"),
    ("headline: resnet50 from JPEGs", "of_alone", "fed by the loader / the step alone", ">= 0.9"),
)
"""Where a figure stands, under which key, what it is, and what it is to be."""


def install(wheels: Path, target: str) -> None:
    """Unpack wheels where this process and those it starts find them."""
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    if not files:
        sys.exit(f"there are no wheels in {wheels}; see the first lines of {__file__}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", target, *files], check=True)
    sys.path.insert(0, target)


def goals(outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """What was measured beside what is to be reached."""
    rows = []
    for part, key, what, goal in GOALS:
        outcome = outcomes.get(part)
        value = outcome.found.get(key) if outcome else None
        sign, bound = goal.split()
        reached = None
        if value is not None:
            reached = value <= float(bound) if sign == "<=" else value >= float(bound)
        rows.append({"what": what, "goal": goal, "value": value, "reached": reached})
    return rows


def shown(name: str, outcome: Outcome) -> str:
    """A row of the table."""
    return f"{name:32} {outcome.status:8} {outcome.seconds:6.1f} s  {outcome.reason}".rstrip()


def main() -> None:
    """Run the parts, print the table, write the report, and exit with 1 if a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="folder of the report")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use for this run")
    parser.add_argument("--fashion", type=Path, help="folder that tests/support/fashion.py made")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is a GPU")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names of parts")
    parser.add_argument("--list", action="store_true", help="show the names of the parts")
    options = parser.parse_args()
    parts = [part for part in PARTS if part.name.startswith(tuple(options.only))]
    if options.list:
        print("\n".join(part.name for part in parts))
        return
    started = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ricciq-gpu-") as folder:
        if options.wheels:
            install(options.wheels, f"{folder}/site")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # of all processes
        report = look(parts, options, Path(folder), started)
    failed = [name for name, part in report["parts"].items() if part["log"]]
    for name in failed:
        print(f"\n== {name}: the last lines\n" + "\n".join(report["parts"][name]["log"]))
    print(f"\n{options.output / 'report.json'} is written; {len(failed) or 'no'} parts failed")
    sys.exit(1 if failed else 0)


def look(
    parts: list[Part], options: argparse.Namespace, folder: Path, started: float
) -> dict[str, Any]:
    """Run the parts; the report is written after each of them."""
    if options.device == "cpu":  # several run at a time
        os.environ["OMP_NUM_THREADS"] = "1"
    processes, environment = processes_and_environment(options.device)
    device = environment["device"]
    report: dict[str, Any] = {"environment": environment, "goals": [], "parts": {}}
    print("  ".join(f"{key} {value}" for key, value in report["environment"].items()))

    def tell(name: str, outcome: Outcome) -> None:
        print(shown(name, outcome), flush=True)
        report["parts"][name] = asdict(outcome)
        report["seconds"] = time.monotonic() - started
        (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")

    fashion = options.fashion.resolve() if options.fashion else None
    context = Context(device, folder, fashion)
    seconds = 60 * options.minutes - (time.monotonic() - started)
    at_once = 4 if device == "cuda" else 2
    outcomes = run_parts(processes, parts, context, seconds, at_once, tell)
    for name, outcome in outcomes.items():
        if lines := outcome.found.get("lines"):
            print(f"\n== {name}\n" + "\n".join(lines))
    report["goals"] = goals(outcomes)
    print("\n== goals" + ("" if device == "cuda" else " (of a CPU with tiny sizes: no figures)"))
    for row in report["goals"]:
        value = "not measured" if row["value"] is None else f"{row['value']:.3f}"
        verdict = {True: "reached", False: "missed", None: ""}[row["reached"]]
        print(f"{row['what']:40} {row['goal']:8} {value:12} {verdict}".rstrip())
    (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
