"""Whether the network may be used: one switch, which the libraries of Hugging Face read, too."""

from __future__ import annotations

import os

SWITCH = "HF_HUB_OFFLINE"
_OF_DATASETS = "HF_DATASETS_OFFLINE"
"""Goes before the other in that library."""


def forbid_network() -> None:
    """Keep this process and those it starts off the network.

    To be called before the libraries of Hugging Face are imported, which look once.
    """
    os.environ[SWITCH] = os.environ[_OF_DATASETS] = "1"


def is_network_forbidden() -> bool:
    """Whether what is not on this machine cannot be had."""
    return os.environ.get(SWITCH, "").upper() in ("1", "ON", "YES", "TRUE")
