"""Examine the environment: versions, devices, and problems with their remedies.

Nothing is taken from the network.
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
"""Bytes of memory or disk that a usual run needs."""
_MODULES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
INTEGER_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")
"""CPU flags of integer dot products; on x86, VNNI. Without any, 8-bit kernels are hardly faster."""
_COMPILERS = ("g++", "clang++")
_WIDE_INSTRUCTIONS = ("avx2", "avx512f")


class Problem(NamedTuple):
    """Something that is missing or does harm.

    Attributes:
        what: the problem.
        remedy: what to do about it.
        essential: whether nothing works until it is solved.
    """

    what: str
    remedy: str
    essential: bool = False


def examine() -> dict[str, Any]:
    """Examine this installation and machine; plain values, the problems come last."""
    versions = {"python": platform.python_version(), "ricciq": __version__}
    problems = list(_dependencies(versions))
    values: dict[str, Any] = {"versions": versions}
    if not any(problem.essential for problem in problems):  # the rest needs these libraries
        values |= {"cpu": _cpu(), **_room(), **_devices()}
        problems += [*_slow(values), *_lacking()]
    return values | {"problems": [problem._asdict() for problem in problems]}


def _dependencies(versions: dict[str, str]) -> Iterator[Problem]:
    """Import what ricciq depends on, and note the versions."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        yield Problem("packaging is not installed", "pip install packaging", essential=True)
        return
    try:
        needed = metadata.requires("ricciq") or []
    except metadata.PackageNotFoundError:
        yield Problem("ricciq is found but not installed", "pip install .")
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
        except Exception as error:  # a broken library may raise anything
            reason = on_one_line(error, 160)
            if package == "torchvision":
                remedy = f"install the torchvision that matches torch {versions.get('torch')}"
            what = f"{package} {versions[package]} cannot be imported ({reason})"
            yield Problem(what, remedy, essential=True)
        else:
            if not wanted.contains(versions[package], prereleases=True):
                yield Problem(f"{package} is {versions[package]}, but {wanted} is needed", remedy)
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


def cpu_flags() -> set[str]:
    """Names of the CPU's instruction sets; empty where Linux does not list them."""
    info = _cpu_info()
    return set(info.get("flags", info.get("Features", "")).split())


def has_integer_instructions() -> bool | None:
    """Whether the CPU has instructions for integer dot products; None if that is not known."""
    flags = cpu_flags()
    return bool(flags & {*INTEGER_INSTRUCTIONS}) if flags else None


def _cpu_info() -> dict[str, str]:
    listed = Path("/proc/cpuinfo")
    if not listed.is_file():
        return {}
    lines = (line.partition(":") for line in listed.read_text().splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _cpu() -> dict[str, Any]:
    """Name, cores, and instructions that matter for speed; None where they are not known."""
    import psutil

    flags = cpu_flags()
    process: Any = psutil.Process()  # macOS has no affinity
    usable = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count()
    known = [name for name in (*_WIDE_INSTRUCTIONS, *INTEGER_INSTRUCTIONS) if name in flags]
    return {
        "name": _cpu_info().get("model name") or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "usable": usable,
        "instructions": known if flags else None,
    }


def _devices() -> dict[str, Any]:
    """The devices of torch and onnxruntime."""
    import onnxruntime
    import torch

    cuda = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        cuda.append({"name": properties.name, "memory_gb": properties.total_memory / 1e9})
    return {
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "cuda_build": torch.version.cuda,
        "providers": onnxruntime.get_available_providers(),
    }


def _slow(values: dict[str, Any]) -> Iterator[Problem]:
    """Problems that make runs or exported files slow."""
    instructions = values["cpu"]["instructions"]
    if instructions is not None and not {*instructions} & {*INTEGER_INSTRUCTIONS}:
        yield Problem(
            "this CPU has no instructions for integer dot products (VNNI), so 8-bit files gain "
            "little speed on it",
            "run `ricciq bench` on the machine that will run the files",
        )
    if values["cuda_build"] is None:
        yield Problem(
            "torch is built without CUDA and trains on the CPU",
            "with an NVIDIA GPU, install a torch built for CUDA",
        )
    elif not values["cuda"]:
        yield Problem(
            f"torch is built for CUDA {values['cuda_build']} but finds no device",
            "with an NVIDIA GPU, check its driver with nvidia-smi; else ignore this",
        )
    if values["threads"] < values["cpu"]["usable"] // 2:
        yield Problem(
            f"torch uses {values['threads']} of {values['cpu']['usable']} processors",
            "unset OMP_NUM_THREADS, or raise it",
        )


def _lacking() -> Iterator[Problem]:
    """Problems with folders, disks, memory and the compiler."""
    import psutil
    from huggingface_hub.constants import HF_HOME

    from ricciq.data.loader import why_not_shared

    scratch = _temporary_folder()
    for folder, why, remedy in (
        (Path(), "", "change to another folder, or give --output"),
        (scratch, ", so there is no temporary folder", "set TMPDIR to a folder that can"),
        (Path(HF_HOME), ", where downloads are kept", "set HF_HOME to a folder that can"),
    ):
        if reason := _why_not_written(folder):
            yield Problem(f"{folder.absolute()} cannot be written ({reason}){why}", remedy)
    for folder, least, remedy in (
        (Path(), LITTLE, "make room, or give --output"),
        (scratch, LITTLE / 8, "make room, or set TMPDIR to a folder on another disk"),
    ):
        if folder.is_dir() and (free := shutil.disk_usage(folder).free) < least:
            yield Problem(f"only {_gigabytes(free)} are free in {folder.absolute()}", remedy)
    if (memory := psutil.virtual_memory().available) < LITTLE:
        yield Problem(
            f"only {_gigabytes(memory)} of memory are available",
            "end other programs, or give a smaller --batch-size",
        )
    shared = Path("/dev/shm")
    if reason := why_not_shared():
        yield Problem(
            f"processes cannot share memory ({reason}), so images are decoded in one process",
            f"mount {shared} so that it can be written",
        )
    elif shared.is_dir() and (size := shutil.disk_usage(shared).total) < LITTLE / 8:
        yield Problem(
            f"{shared} has only {_gigabytes(size)}, and --workers pass images through it",
            "give --workers 0, or start the container with --shm-size 2g",
        )
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), *_COMPILERS)))):
        yield Problem(
            f"there is no C++ compiler ({' or '.join(_COMPILERS)}), so torch.compile fails",
            "install one, or give --no-compile where it is the default: on a GPU",
        )


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:  # it tries several
        return Path(os.environ.get("TMPDIR", "/tmp"))


def _why_not_written(folder: Path) -> str | None:
    """Why nothing can be written in a folder, or where it would be made; None if it can."""
    place = next(parent for parent in [folder, *folder.absolute().parents] if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return error.strerror or on_one_line(error)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
