"""What this machine's CPU can do."""

from __future__ import annotations

import platform
from pathlib import Path


def saturates() -> bool:
    """Whether onnxruntime's 8-bit kernels may saturate: on x86 without instructions for VNNI.

    Then a file with optimizations on need not give what torch does, see Known limits in the README.
    """
    listed = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not listed.is_file():
        return False
    return not {"avx512_vnni", "avx_vnni"} & set(listed.read_text().split())
