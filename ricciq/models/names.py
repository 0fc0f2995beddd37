"""How timm names models. It imports nothing, so that parsing a command line can use it."""

from __future__ import annotations

HUB, FOLDER = "hf-hub:", "local-dir:"
"""Prefixes of models in a repository of the Hugging Face hub, and in a folder."""


_OLD_HUB, _TIMM = "hf_hub:", "timm/"


def with_prefix(name: str) -> str:
    """The name of a model in a repository of the hub, as ``hf-hub:OWNER/NAME``.

    Args:
        name: in full, or as ``hf_hub:OWNER/NAME`` or ``timm/NAME``. Other names stay as they are.
    """
    if name.startswith(_TIMM):
        return f"{HUB}{name}"
    return HUB + name.removeprefix(_OLD_HUB) if name.startswith(_OLD_HUB) else name


def architecture(name: str) -> str:
    """The name of a model without its tag: resnet50 of resnet50.a1_in1k.

    Args:
        name: timm's name.
    """
    return name.partition(".")[0]
