"""The form digits: scikit-learn's digits, which need no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ricciq.data.sources.base import ImageArrays, Parts

DIGITS_VALIDATION = 360


def open_source(name: str, root: Path | None) -> Parts:  # noqa: ARG001
    """scikit-learn's 1,797 scanned digits of 8x8 pixels, 360 of them for validation.

    Args:
        name: digits.
        root: ignored.

    Returns:
        The class names and both parts; the split is fixed and stratified.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # Grey levels 0..16 become bytes: value * 255 / 16, rounded half to even.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    train, val = train_test_split(
        np.arange(len(pixels)),
        test_size=DIGITS_VALIDATION,
        stratify=digits.target,
        random_state=0,
    )
    return Parts(
        [str(name) for name in digits.target_names],
        ImageArrays(pixels[train], digits.target[train]),
        ImageArrays(pixels[val], digits.target[val]),
    )
