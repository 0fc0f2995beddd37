"""What this machine's CPU can do."""

from __future__ import annotations

import platform

from ricciq.workflows.doctor import INTEGER_INSTRUCTIONS, cpu_flags


def saturates() -> bool:
    """Whether onnxruntime's 8-bit kernels may saturate: on x86 without instructions for VNNI.

    Then a file with optimizations on need not give what torch does, see Known limits in the README.
    """
    flags = cpu_flags()
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return bool(is_x86 and flags and not flags & {*INTEGER_INSTRUCTIONS})
