"""The quantizers by name: class, reference, and what a recipe must know of them. Free of torch.

To add one, write a module with its class, and an entry here. The recipe's keys ``weight_quantizer``
and ``act_quantizer``, their descriptions and errors, and the table in the README are made of these
entries; `tests/laws/test_quantizer_contract.py` runs over all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from ricciq.errors import listed

if TYPE_CHECKING:
    from ricciq.quant.grid import Bits


@dataclass(frozen=True)
class Entry:
    """A quantizer.

    What it can do beyond this is asked of its class.

    Attributes:
        path: "module:Class", the module inside `ricciq.quant`.
        line: what it does, for people, in a few words.
        reference: the paper, as an arXiv number.
        widths: the bit widths that it has.
        can_change_width: whether its width can change during training, to any other.
    """

    path: str
    line: str
    reference: str | None = None
    widths: tuple[Bits, ...] = tuple(range(1, 9))
    can_change_width: bool = True

    def load(self) -> type[Any]:
        """The quantizer's class; imports its module, and torch with it."""
        module, name = self.path.split(":")
        return cast(type[Any], getattr(import_module(f"ricciq.quant.{module}"), name))


@dataclass(frozen=True)
class WeightEntry(Entry):
    """A quantizer of weights.

    Attributes:
        widths: as in `Entry`; weights may be ternary, too.
    """

    widths: tuple[Bits, ...] = (*range(1, 9), "ternary")


WEIGHTS: dict[str, WeightEntry] = {
    "lsq": WeightEntry("lsq:LSQWeights", "a learned scale per channel", "1902.08153"),
    "odd": WeightEntry(
        "odd:OddWeights", "a learned scale per channel, with levels −3, −1, 1, 3 and so on"
    ),
    "dorefa": WeightEntry(
        "dorefa:DoReFaWeights",
        "odd levels over the range of tanh(w) in the layer",
        "1606.06160",
        can_change_width=False,
    ),
    "fixed": WeightEntry("fixed:FixedWeights", "the scales that calibration finds"),
    "codebook": WeightEntry(
        "codebook:CodebookWeights",
        "a learned scale per channel and learned levels per layer, which are int8 at run time",
        # Packing splits codes of other widths into planes that add up, which learned ones do not.
        widths=(1, 2, 4, 8, "ternary"),
        can_change_width=False,
    ),
}
"""Every quantizer of weights, in the order in which they are shown; the first is the default."""
ACTIVATIONS: dict[str, Entry] = {
    "lsq": Entry("lsq:LSQActivations", "a learned scale", "1902.08153"),
    "pact": Entry(
        "pact:PACTActivations", "a scale learned from what is clipped alone", "1805.06085"
    ),
    "fixed": Entry("fixed:FixedActivations", "the scale that calibration finds"),
}
"""Every quantizer of activations, as `WEIGHTS`."""
QUANTIZERS: Mapping[str, Mapping[str, Entry]] = {
    "weight_quantizer": WEIGHTS,
    "act_quantizer": ACTIVATIONS,
}
"""By the key of a recipe that names one."""
DEFAULT_WEIGHTS = next(iter(WEIGHTS))
DEFAULT_ACTIVATIONS = next(iter(ACTIVATIONS))


def described(catalog: Mapping[str, Entry]) -> str:
    """All names, with what each quantizer does."""
    return "; ".join(f"{name}, {entry.line}" for name, entry in catalog.items())


def check_width(key: str, name: str, bits: Bits) -> None:
    """Refuse a width that a quantizer does not have.

    Args:
        key: of `QUANTIZERS`.
        name: of the quantizer.
        bits: the width.

    Raises:
        ValueError: it does not have it; one sentence says which to give.
    """
    widths = QUANTIZERS[key][name].widths
    if bits not in widths:
        raise ValueError(
            f"{key} {name} does not support a width of {bits}; give {listed(widths)}, or another "
            f"{key}"
        )
