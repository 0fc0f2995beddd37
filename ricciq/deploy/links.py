"""Which integer kernels a runtime fuses: where a quantizer reads a layer, a sum or an average.

A runtime computes such a quantizer's codes from integers, without a float number between. So does a
deployed model in torch, once it is linked. The modules in between run as before, on float numbers
that nothing reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ricciq.convert.plan import ADDITIONS
from ricciq.convert.trace import Call, Recording, Value, record
from ricciq.deploy.kernels import add, average, requantize
from ricciq.deploy.modules import DeployedActivation, DeployedLayer, Source

_SHAPING = {"flatten", "view", "reshape", "squeeze", "Flatten"}
_AVERAGES = {"mean", "adaptive_avg_pool2d", "AdaptiveAvgPool2d"}
_RECTIFIERS: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(("ReLU", "relu", "relu_"), (0.0, None)),
    **dict.fromkeys(("ReLU6", "relu6"), (0.0, 6.0)),
}
"""The ends that activations clip to."""
_EXACT = {
    *_SHAPING,
    *_RECTIFIERS,
    *("cat", "chunk", "split", "transpose", "permute", "contiguous", "__getitem__", "getattr"),
    *("max_pool2d", "MaxPool2d", "pad", "ZeroPad2d", "dropout", "Dropout"),
}
"""What moves or chooses numbers, so that it returns the same ones in each runtime."""


@dataclass
class _Layer(Source):
    """A layer's sums, perhaps rectified."""

    layer: DeployedLayer
    low: float | None = None
    high: float | None = None

    @property
    def operands(self) -> set[DeployedLayer | DeployedActivation]:
        return {self.layer}

    def codes(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        codes = requantize(self.layer.sums.take(), scale, zero_point)
        ends = [
            None if end is None else (codes.new_tensor(end) / scale).round() + zero_point
            for end in (self.low, self.high)
        ]
        return codes if ends == [None, None] else codes.clamp(*ends)

    def reserve(self) -> None:
        self.layer.sums.reserve()


@dataclass
class _Sum(Source):
    """The sum of what two quantizers return."""

    first: DeployedActivation
    second: DeployedActivation

    @property
    def operands(self) -> set[DeployedLayer | DeployedActivation]:
        return {self.first, self.second}

    def codes(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        return add(self.first.codes.take(), self.second.codes.take(), scale, zero_point)

    def reserve(self) -> None:
        self.first.codes.reserve()
        self.second.codes.reserve()


@dataclass
class _Average(Source):
    """The average over height and width of what a quantizer returns."""

    of: DeployedActivation

    @property
    def operands(self) -> set[DeployedLayer | DeployedActivation]:
        return {self.of}

    def codes(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        return average(self.of.codes.take(), scale, zero_point)

    def reserve(self) -> None:
        self.of.codes.reserve()


class Linked(NamedTuple):
    """A deployed model that computes as integer kernels do.

    Attributes:
        model: itself.
        float_from: the first layer, in the order of the pass, whose input a runtime computes in
            float: from there on, codes may differ by how ties are rounded. None: all are equal.
    """

    model: nn.Module
    float_from: str | None


def link(deployed: nn.Module, input_size: Sequence[int]) -> Linked:
    """Let quantizers of a deployed model compute their codes as a runtime's kernels do, in place.

    Args:
        deployed: from `ricciq.deploy.modules.deploy`.
        input_size: of an image, (channels, height, width).
    """
    if not any(isinstance(module, DeployedLayer) for module in deployed.modules()):
        return Linked(deployed, None)
    device = next(chain(deployed.parameters(), deployed.buffers())).device
    images = torch.zeros(2, *input_size, device=device)
    linking = _Linking(deployed, record(deployed, images))
    linking.link()
    return Linked(deployed, linking.float_from())


class _Linking:
    """Finds what each quantizer reads in a recorded pass."""

    def __init__(self, deployed: nn.Module, recording: Recording) -> None:
        self.deployed, self.recording = deployed, recording
        self.modules = dict(deployed.named_modules())
        self.made_by: dict[Value, Call] = {}
        self.read: dict[DeployedActivation, set[Value]] = {}
        self.equal: dict[DeployedLayer | DeployedActivation, bool] = {}
        for call in recording.calls:
            self.made_by.update(dict.fromkeys(call.outputs, call))

    def link(self) -> None:
        """Link all quantizers that can be."""
        users: Counter[DeployedActivation] = Counter()
        several = set()
        for name, value in self.recording.first_argument.items():
            quantizer = self._quantizer(name)
            if quantizer is not None:
                users[quantizer] += 1
                self.read.setdefault(quantizer, set()).add(value)
                if self.recording.times[name] > 1:
                    several.add(quantizer)
        for quantizer, values in self.read.items():
            if len(values) == 1 and quantizer not in several:
                quantizer.source = self._source(quantizer, *values)
            if quantizer.source is not None:
                for _ in range(users[quantizer]):
                    quantizer.source.reserve()

    def float_from(self) -> str | None:
        """See `Linked`."""
        for call in self.recording.calls:  # in order, so that what is asked for is known
            module = self.modules[call.name]
            if isinstance(module, DeployedLayer) and not self._is_equal(module):
                return call.name
        return None

    def _is_equal(self, module: DeployedLayer | DeployedActivation) -> bool:
        """Whether a layer's sums, or a quantizer's codes, are the same in each runtime."""
        if module not in self.equal:
            self.equal[module] = False  # if it reads its own output
            if isinstance(module, DeployedLayer):
                given = module.input_quantizer
                assert isinstance(given, DeployedActivation | None)
                found = module.is_integer and given is not None and self._is_equal(given)
            elif module.source is not None:
                found = all(map(self._is_equal, module.source.operands))
            else:
                found = all(map(self._is_value_equal, self.read[module]))
            self.equal[module] = found
        return self.equal[module]

    def _is_value_equal(self, value: Value) -> bool:
        """Whether a value is; what a layer returns is computed in float, unless it is linked."""
        if value in self.recording.given or value in self.recording.constants:
            return True
        call = self.made_by.get(value)
        if call is None:  # made by what returns nothing, such as an assignment to a part
            return False
        module = self.modules[call.name]
        if isinstance(module, DeployedActivation):
            return self._is_equal(module)
        return call.kind in _EXACT and all(map(self._is_value_equal, call.inputs))

    def _quantizer(self, name: str) -> DeployedActivation | None:
        """The quantizer that is a module, or that quantizes its input."""
        module = self.modules[name]
        if isinstance(module, DeployedLayer):
            module = module.input_quantizer
        return module if isinstance(module, DeployedActivation) else None

    def _source(self, quantizer: DeployedActivation, value: Value) -> Source | None:
        """What a quantizer reads, if an integer kernel ends in it."""
        call = self._maker(value, quantizer)
        while call is not None and call.kind in _SHAPING:
            call = self._maker(call.inputs[0])
        if call is None:
            return None
        if call.kind in _AVERAGES:
            of = self._returned(call.inputs[0])
            return _Average(of) if of and self._is_global(call) else None
        ends: tuple[float | None, float | None] = (None, None)
        kind = type(self.modules[call.name]).__name__  # of a module that was seen inside, too
        kind = kind if kind in _RECTIFIERS else call.kind
        if kind in _RECTIFIERS:
            if quantizer.zero_point != 0:
                return None
            ends = _RECTIFIERS[kind]
            call = self._maker(call.inputs[0])
        if call is None:
            return None
        layer = self.modules[call.name]
        if isinstance(layer, DeployedLayer) and layer.is_integer:
            return _Layer(layer, *ends) if self.recording.times[call.name] == 1 else None
        if call.kind in ADDITIONS and len(call.inputs) == 2:
            first, second = map(self._returned, call.inputs)
            if first and second and ends[1] is None:
                return _Sum(first, second)
        return None

    def _maker(self, value: Value, quantizer: DeployedActivation | None = None) -> Call | None:
        """What made a value that is read once, or by one quantizer alone."""
        readers = {
            self._quantizer(call.name) or call.name for call in self.recording.readers[value]
        }
        alone = readers == {quantizer} if quantizer else len(readers) == 1
        return self.made_by.get(value) if alone and value not in self.recording.result else None

    def _is_global(self, call: Call) -> bool:
        """Whether an average is over height and width."""
        given, found = (
            self.recording.shapes.get(value) for value in (call.inputs[0], call.outputs[0])
        )
        if given is None or found is None or len(given) != 4:
            return False
        if call.kind == "mean" and sorted(axis % 4 for axis in call.integers) != [2, 3]:
            return False
        return found[:2] == given[:2] and found[2:].numel() == 1

    def _returned(self, value: Value) -> DeployedActivation | None:
        """The quantizer that returned a value."""
        call = self.made_by.get(value)
        if call is None or not call.is_module or self.recording.times[call.name] != 1:
            return None
        module = self.modules[call.name]
        return module if isinstance(module, DeployedActivation) else None
