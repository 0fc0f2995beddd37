"""The environment: versions, devices, and what is missing or does harm, with its remedy.

Everything is looked at as it is now, nothing is taken from the network.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from ricciq._version import __version__
from ricciq.errors import on_one_line

LITTLE = 2e9
"""Bytes of memory or disk below which a run of a usual size ends early."""
_MODULES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
_INTEGER_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")
_WIDE_INSTRUCTIONS = ("avx2", "avx512f")


class Problem(NamedTuple):
    """Something missing or harmful.

    Attributes:
        what: it is.
        remedy: what to do.
        essential: whether nothing works until then.
    """

    what: str
    remedy: str
    essential: bool = False


def examine() -> dict[str, Any]:
    """What this installation and machine are, as plain values; the problems come last."""
    versions = {"python": platform.python_version(), "ricciq": __version__}
    problems = list(_dependencies(versions))
    values: dict[str, Any] = {"versions": versions}
    if not any(problem.essential for problem in problems):  # what looks at the rest is there
        values |= {"cpu": _cpu(), **_room(), **_devices()}
        problems += [*_slow(values), *_lacking()]
    return values | {"problems": [problem._asdict() for problem in problems]}


def _dependencies(versions: dict[str, str]) -> Iterator[Problem]:
    """Import what ricciq says it needs, and note the versions."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        yield Problem("packaging is not installed", "pip install packaging", essential=True)
        return
    try:
        needed = metadata.requires("ricciq") or []
    except metadata.PackageNotFoundError:
        yield Problem("ricciq itself is not installed, only found", "pip install .")
        needed = ["torch", "timm", "onnx", "onnxruntime"]
    for requirement in map(Requirement, [*needed, "torchvision"]):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        package, wanted = requirement.name, requirement.specifier
        remedy = f"pip install '{package}{wanted}'"
        try:
            versions[package] = metadata.version(package)
            import_module(_MODULES.get(package, package.replace("-", "_")))
        except metadata.PackageNotFoundError:
            yield Problem(f"{package} is not installed", remedy, essential=True)
        except Exception as error:  # a broken library raises whatever it likes
            reason = on_one_line(error, 160)
            if package == "torchvision":
                remedy = f"install the torchvision that goes with torch {versions.get('torch')}"
            what = f"{package} {versions[package]} does not import ({reason})"
            yield Problem(what, remedy, essential=True)
        else:
            if not wanted.contains(versions[package], prereleases=True):
                yield Problem(f"{package} {versions[package]} is not {wanted}", remedy)
    if util.find_spec("datasets") is None:
        yield Problem("--data hfds/NAME needs datasets", "pip install 'ricciq[hf]'")


def _room() -> dict[str, Any]:
    """Memory and disk, in gigabytes."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "memory_gb": {"total": memory.total / 1e9, "available": memory.available / 1e9},
        "free_disk_gb": shutil.disk_usage(".").free / 1e9,
    }


def _cpu() -> dict[str, Any]:
    """Name, cores, and the instructions that matter here; those only where Linux lists them."""
    import psutil

    about: dict[str, str] = {}
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        lines = (line.partition(":") for line in listed.read_text().splitlines())
        about = {key.strip(): value.strip() for key, _, value in lines}
    flags = set(about.get("flags", about.get("Features", "")).split())
    process: Any = psutil.Process()  # macOS has no affinity
    usable = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count()
    known = [name for name in (*_WIDE_INSTRUCTIONS, *_INTEGER_INSTRUCTIONS) if name in flags]
    return {
        "name": about.get("model name") or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "usable": usable,
        "instructions": known if flags else None,
    }


def _devices() -> dict[str, Any]:
    """What torch and onnxruntime can compute on."""
    import onnxruntime
    import torch

    cuda = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        cuda.append({"name": about.name, "memory_gb": about.total_memory / 1e9})
    return {
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "cuda_build": torch.version.cuda,
        "providers": onnxruntime.get_available_providers(),
    }


def _slow(values: dict[str, Any]) -> Iterator[Problem]:
    """What makes runs or exported files slower than they could be."""
    instructions = values["cpu"]["instructions"]
    if instructions is not None and not {*instructions} & {*_INTEGER_INSTRUCTIONS}:
        yield Problem(
            "this CPU has no instructions for integer products (VNNI), so that 8-bit files gain "
            "little speed on it",
            "run `ricciq bench` on the machine that will use them",
        )
    if values["cuda_build"] is None:
        yield Problem(
            "torch is built without CUDA and trains on the CPU",
            "with an NVIDIA GPU, install a torch built for CUDA",
        )
    elif not values["cuda"]:
        yield Problem(
            f"torch is built for CUDA {values['cuda_build']} and finds no device",
            "with an NVIDIA GPU, look at its driver with nvidia-smi; else ignore this",
        )
    if values["threads"] < values["cpu"]["usable"] // 2:
        yield Problem(
            f"torch uses {values['threads']} of {values['cpu']['usable']} processors",
            "unset OMP_NUM_THREADS, or raise it",
        )


def _lacking() -> Iterator[Problem]:
    """What the folder and the machine have too little of."""
    import psutil

    try:
        with tempfile.TemporaryFile(dir="."):
            pass
    except OSError as error:
        yield Problem(
            f"{Path.cwd()} cannot be written ({error.strerror})", "go to another, or give --output"
        )
    if (free := shutil.disk_usage(".").free) < LITTLE:
        yield Problem(f"{_gigabytes(free)} are free on this disk", "make room, or give --output")
    if (memory := psutil.virtual_memory().available) < LITTLE:
        yield Problem(
            f"{_gigabytes(memory)} of memory are available",
            "end other programs, or give a smaller --batch-size",
        )
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < LITTLE / 8:
        yield Problem(
            f"{shared} holds {_gigabytes(size)}, and --workers pass pictures through it",
            "give --workers 0, or start the container with --shm-size 2g",
        )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
