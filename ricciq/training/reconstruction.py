"""Quantization without training: ranges, learned rounding and biases, in one pass of each network.

With the weights it came with, the network shows what each layer should return. Then the discrete
one runs over the same images in lockstep: where they have all reached a layer, its input's range is
found, its rounding is learned (`ricciq.training.adaround`), and the mean error of each output
channel is subtracted from its bias (Nagel et al. 2019, arXiv 1906.04721, section 4.2); then they go
on. With few bits, all layers are tuned together then (`ricciq.training.tuning`). Labels are not
needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ricciq.errors import InputError, RicciqError, is_out_of_memory, listed
from ricciq.evaluation import evaluating
from ricciq.layers.base import QuantLayer
from ricciq.layers.rows import Place, random_places, values_at
from ricciq.networks import logits_of
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.calibration import LogHistogram, check_finite, choose_range
from ricciq.quant.grid import count_codes
from ricciq.quant.weight import WeightQuantizer
from ricciq.system.journal import Journal
from ricciq.training.adaround import learn_rounding
from ricciq.training.lockstep import Lockstep, PartedError
from ricciq.training.tuning import CHUNK, tune

POSITIONS, NUMBERS = 16, 2**26
"""Outputs for each image that rounding is learned from, as rows of a linear regression: fewer where
all rows would hold more numbers. Depthwise layers with large kernels have many to few weights."""
SAMPLE = 2**14
"""Numbers of a chunk that a range is found from, apart from the least and the greatest."""
FEW_CODES = 4
"""Codes of a weight or an activation up to which layers are tuned together: with more, it did not
help on each of two networks."""


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    batches: Iterable[Tensor],
    steps: int,
    journal: Journal,
    candidates: int = 100,
) -> None:
    """Fit the outputs of a converted model's layers to those it has with its float weights.

    It need not be calibrated: the ranges of all activations are found, too. Rounding is learned
    where the quantizer can (see `ricciq.quant.weight.WeightQuantizer.can_learn_rounding`), and the
    latent weights become levels there; other weights are rounded to the nearest level as before.
    Layers whose weight a parent uses itself are left out. A layer that runs more than once is
    fitted where it runs first. What a module keeps in its attributes from one layer to the next is
    not kept for each image.

    Args:
        model: converted from a float model and not trained since, changed in place.
        batches: (B, C, H, W) images on the model's device; 256 in all are enough.
        steps: optimizer steps for each layer, and then for all of them together.
        journal: shows progress.
        candidates: how many scales to try for each range; see `choose_range`.

    Raises:
        InputError: there is no image, activations are not finite, or images take different paths
            through the model.
        RicciqError: there is not enough memory; the message says how many images fitted.
    """
    shown = list(batches)
    if not shown:
        raise InputError("there is no image to calibrate on; give at least one batch")
    images = torch.cat(shown)
    chunks = torch.split(images, CHUNK)
    layers = {
        name: _Folded(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLayer) and layer.lent_to is None
    }
    fitting = _Fitting(model, layers, chunks, steps, candidates)
    with fitting.explaining():
        with evaluating(model), ExitStack() as folding:
            for folded in layers.values():
                folding.enter_context(folded.in_place())
            goals, logits = _run_float(model, layers, chunks, journal)
            with journal.bar("rounding", len(layers)) as advance:
                fitting.run(goals, advance)
        if any(isinstance(m, QuantLayer) and _has_few_codes(m) for m in model.modules()):
            tune(model, images, torch.cat(logits), steps, journal)


def _has_few_codes(layer: QuantLayer) -> bool:
    given = layer.input_quantizer
    widths = [layer.weight_quantizer.bits] + ([] if given is None else [given.bits])
    return min(map(count_codes, widths)) <= FEW_CODES


class _Folded:
    """A layer in evaluation whose weight is computed once, with its BatchNorm folded in.

    Args:
        layer: whose function it is.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: QuantLayer) -> None:
        self.layer, self.function, self.quantize = layer, layer.function(), layer.input_quantizer

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The layer computes this."""
        self.layer.forward = self.__call__
        try:
            yield
        finally:
            del self.layer.forward

    def fold(self, weight: Tensor) -> None:
        """Compute with another weight.

        Args:
            weight: (rows, ...).
        """
        factor, shift = self.layer.affine()
        weight = weight * factor.to(weight).view(-1, *[1] * (weight.dim() - 1))
        self.weight = weight.transpose(0, 1) if self.layer.weight_axis == 1 else weight
        self.bias = shift.to(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output."""
        x = x if self.quantize is None else self.quantize(x)
        return self.function(x, self.weight, self.bias)


@dataclass
class _Goal:
    """What a layer of the float network returns.

    Attributes:
        places: for each chunk, the outputs whose values are kept.
        values: for each chunk, (n, channels) these values.
        means: for each chunk, (channels,) the mean, float64.
    """

    places: list[Place] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)


@contextmanager
def _in_float(model: nn.Module) -> Iterator[None]:
    """Nothing is rounded. The weights of folded layers are not the quantizers' matter."""

    def as_it_came(quantizer: WeightQuantizer, args: tuple[Tensor], _: Tensor) -> Tensor:
        weight: Tensor = quantizer.layer_standardize(args[0])
        return weight

    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    with ExitStack() as hooks:
        for quantizer in quantizers:
            quantizer.leave_float()
        for module in model.modules():
            if isinstance(module, WeightQuantizer):
                hooks.callback(module.register_forward_hook(as_it_came).remove)
        try:
            yield
        finally:
            for quantizer in quantizers:
                quantizer.observer = None


def _run_float(
    model: nn.Module, layers: Mapping[str, _Folded], chunks: Sequence[Tensor], journal: Journal
) -> tuple[dict[str, _Goal], list[Tensor]]:
    """What each layer returns where it runs first, with its float weight, and the logits."""
    goals: dict[str, _Goal] = {name: _Goal() for name in layers}
    logits: list[Tensor] = []
    due: set[str] = set()
    chance = torch.Generator().manual_seed(0)

    def watch(name: str, layer: QuantLayer) -> Callable[..., None]:
        goal, channel = goals[name], layer.channel_axis
        width = layer.latent[0].numel() * getattr(layer, "groups", 1)
        positions = max(1, min(POSITIONS, NUMBERS // (width * sum(map(len, chunks)))))

        def note(module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ARG001
            if name not in due:
                return
            due.remove(name)
            mean = _channel_means(output, channel)
            check_finite(mean, name)
            goal.means.append(mean)
            if layer.weight_quantizer.can_learn_rounding:
                chosen = random_places(output.shape, channel, positions * count, chance)
                place = tuple(index.to(output.device) for index in chosen)
                goal.places.append(place)
                goal.values.append(values_at(output, channel, place).float())

        return note

    with (
        _in_float(model),
        ExitStack() as hooks,
        journal.bar("float layers", len(chunks)) as advance,
    ):
        for name, folded in layers.items():
            layer = folded.layer
            folded.fold(layer.weight_quantizer.layer_standardize(layer.latent))
            handle = layer.register_forward_hook(watch(name, layer), prepend=True)
            hooks.callback(handle.remove)
        for chunk in chunks:
            due.update(layers)
            count = len(chunk)
            logits.append(logits_of(model(chunk)))
            advance(lambda: "")
    return goals, logits


class _Fitting:
    """The pass of the discrete network; each layer is handled once, where all chunks reach it."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, _Folded],
        chunks: Sequence[Tensor],
        steps: int,
        candidates: int,
    ) -> None:
        self.model, self.chunks, self.steps, self.candidates = model, chunks, steps, candidates
        sizes = torch.tensor([len(chunk) for chunk in chunks], dtype=torch.float64)
        self.shares = sizes / sizes.sum()
        self.folded = {folded.layer: folded for folded in layers.values()}
        self.names = {module: name for name, module in model.named_modules()}
        self.lockstep = Lockstep(self._handle)
        self.done: set[Any] = set()
        self.waiting = 0
        """Chunks that have reached the next point where all of them meet."""

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Say what the user can do about errors."""
        try:
            yield
        except PartedError as error:
            paths = [self.names[at[1]] if at else "the end" for at in error.names]
            raise InputError(
                f"images take different paths through the model, to {listed(set(paths))}; set "
                "quantization.reconstruction to 0"
            ) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            count, fitted = (sum(map(len, c)) for c in (self.chunks, self.chunks[: self.waiting]))
            remedy = f"set quantization.reconstruction_images to {fitted or count // 2}"
            raise RicciqError(
                f"there is not enough memory for {count} images at a layer"
                + (f", but for {fitted}" if fitted else "")
                + f"; {remedy if count > 1 else 'give a smaller model or input size'}"
            ) from None

    def run(self, goals: Mapping[str, _Goal], advance: Callable[[Callable[[], str]], None]) -> None:
        """Fit all layers to all images."""
        self.goals = {layer: goals[self.names[layer]] for layer in self.folded}
        self.advance = advance
        with ExitStack() as hooks:
            for module in self.names:
                if isinstance(module, ActivationQuantizer):
                    before = module.register_forward_pre_hook(self._before_quantizer)
                    hooks.callback(before.remove)
            for layer in self.goals:
                before = layer.register_forward_pre_hook(self._before_layer)
                # In front of what else a layer does with its output, such as to quantize it.
                after = layer.register_forward_hook(self._after_layer, prepend=True)
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            self.lockstep.run(self.model, self.chunks)

    def _meet(self, step: Callable[..., Any], module: nn.Module, value: Tensor) -> Any:
        key = (step, module)
        if key in self.done:
            return None
        self.waiting += 1
        return self.lockstep.meet(key, value)

    def _handle(self, key: tuple[Callable[..., Any], nn.Module], values: list[Tensor]) -> list[Any]:
        step, module = key
        self.done.add(key)
        self.waiting = 0
        return [step(module, values)] * len(values)

    def _before_quantizer(self, module: ActivationQuantizer, args: tuple[Tensor]) -> None:
        self._meet(self._find_range, module, args[0])

    def _before_layer(self, layer: QuantLayer, args: tuple[Tensor]) -> None:
        # The input is quantized after this, but rounding needs the range.
        if layer.input_quantizer is not None:
            self._meet(self._find_range, layer.input_quantizer, args[0])
        self._meet(self._learn, layer, args[0])

    def _after_layer(self, layer: QuantLayer, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        if layer.last_bias is None or (self._correct_bias, layer) in self.done:
            return output
        channel = layer.channel_axis % output.dim()
        means = _channel_means(output, channel)
        change: Tensor = self._meet(self._correct_bias, layer, means)
        return output.add_(change.view(-1, *[1] * (output.dim() - 1 - channel)))

    def _find_range(self, quantizer: ActivationQuantizer, inputs: list[Tensor]) -> None:
        histogram = LogHistogram(self.names[quantizer], SAMPLE)
        for x in inputs:
            histogram(x)
        quantizer.set_range(*choose_range(histogram, quantizer.bits, self.candidates))

    def _learn(self, layer: QuantLayer, inputs: list[Tensor]) -> None:
        goal = self.goals[layer]
        if goal.values:
            quantize = layer.input_quantizer or nn.Identity()
            parts = zip(inputs, goal.places, strict=True)
            rows = torch.cat([quantize(layer.rows_at(x, place)) for x, place in parts])
            learn_rounding(layer, rows, torch.cat(goal.values), self.steps)
            goal.values.clear()
            goal.places.clear()
        self.folded[layer].fold(layer.weight_quantizer(layer.latent))
        self.advance(lambda: self.names[layer])

    def _correct_bias(self, layer: QuantLayer, means: list[Tensor]) -> Tensor:
        """Subtract the mean error of each channel from the bias; returns what was added."""
        bias = layer.last_bias
        assert bias is not None
        errors = torch.stack(self.goals[layer].means) - torch.stack(means)
        change = (self.shares.to(errors.device) @ errors).to(bias)
        bias += change
        self.folded[layer].bias += change
        return change


def _channel_means(output: Tensor, channel: int) -> Tensor:
    """(channels,) as float64, to be added up over chunks."""
    axes = [axis for axis in range(output.dim()) if axis != channel % output.dim()]
    return output.mean(axes).double()
