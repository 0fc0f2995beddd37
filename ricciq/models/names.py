"""How timm names models. It imports nothing, so that parsing a command line can use it."""

from __future__ import annotations

HUB, FOLDER = "hf-hub:", "local-dir:"
"""Prefixes of models in a repository of the Hugging Face hub, and in a folder."""


def architecture(name: str) -> str:
    """The name of a model without its tag: resnet50 of resnet50.a1_in1k.

    Args:
        name: timm's name.
    """
    return name.partition(".")[0]
