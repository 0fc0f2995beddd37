"""Whether the network may be used: one switch, which is passed on to other libraries."""

from __future__ import annotations

import os

SWITCH = "HF_HUB_OFFLINE"
_OF_DATASETS = "HF_DATASETS_OFFLINE"
"""In the datasets library it takes precedence over `SWITCH`."""
_TELEMETRY = "ORT_DISABLE_TELEMETRY"
"""Without it onnxruntime, from 1.29 on, stores an identifier and sends usage data."""


def forbid_network() -> None:
    """Forbid the network to this process and those it starts.

    Call it before the libraries of Hugging Face are imported: they look only once.
    """
    os.environ[SWITCH] = os.environ[_OF_DATASETS] = "1"


def forbid_telemetry() -> None:
    """Forbid onnxruntime to send usage data; call it before onnxruntime is imported."""
    os.environ[_TELEMETRY] = "1"


def would_be_downloaded(what: str, otherwise: str) -> str:
    """The sentence that refuses a download.

    Args:
        what: would be downloaded.
        otherwise: what to do without it.
    """
    return (
        f"{what} would be downloaded, which --offline or HF_HUB_OFFLINE forbids; run once without "
        f"it, or {otherwise}"
    )


def is_network_forbidden() -> bool:
    """Whether nothing may be downloaded."""
    return os.environ.get(SWITCH, "").upper() in ("1", "ON", "YES", "TRUE")
