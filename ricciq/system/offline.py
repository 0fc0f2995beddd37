"""Whether the network may be used: one switch, which other libraries are told of, too."""

from __future__ import annotations

import os

SWITCH = "HF_HUB_OFFLINE"
_OF_DATASETS = "HF_DATASETS_OFFLINE"
"""Goes before the other in that library."""
_TELEMETRY = "ORT_DISABLE_TELEMETRY"
"""Or onnxruntime from 1.29 on keeps an identifier, and reports to its maker."""


def forbid_network() -> None:
    """Keep this process and those it starts off the network.

    To be called before onnxruntime and the libraries of Hugging Face are imported: they look once.
    """
    os.environ[SWITCH] = os.environ[_OF_DATASETS] = "1"
    forbid_telemetry()


def forbid_telemetry() -> None:
    """Keep onnxruntime from reporting; to be called before it is imported."""
    os.environ[_TELEMETRY] = "1"


def is_network_forbidden() -> bool:
    """Whether what is not on this machine cannot be had."""
    return os.environ.get(SWITCH, "").upper() in ("1", "ON", "YES", "TRUE")
