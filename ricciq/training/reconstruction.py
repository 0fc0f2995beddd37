"""Quantization without training: ranges, learned rounding and biases, in one pass of each network.

The float network shows what each layer should return. Then the discrete one runs over the same
images in lockstep: where they have all reached a layer, its input's range is found, its rounding is
learned (`ricciq.training.adaround`), and the mean error of each output channel is subtracted from
its bias (Nagel et al. 2019, arXiv 1906.04721, section 4.2); then they go on. Labels are not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ricciq.errors import InputError, listed
from ricciq.evaluation import evaluating
from ricciq.layers.base import QuantLayer
from ricciq.layers.norm import BatchNorm, affine
from ricciq.layers.rows import Place, random_places, values_at
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.calibration import LogHistogram, check_finite, choose_range
from ricciq.system.journal import Journal
from ricciq.training.adaround import learn_rounding
from ricciq.training.lockstep import Lockstep, PartedError

IMAGES = 256
"""How many images are enough; what they have in memory at a layer is there for all at once."""
CHUNK = 8
"""Images in a forward pass: with more, large tensors are not kept for the next one by the CPU's
allocator, and take twice the time."""
POSITIONS = 16
"""Outputs for each image that rounding is learned from, as rows of a linear regression."""
SAMPLE = 2**16
"""Numbers of a chunk that a range is found from, apart from the least and the greatest."""


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    norms: Mapping[str, str | None],
    batches: Iterable[Tensor],
    steps: int,
    journal: Journal,
    candidates: int = 100,
) -> None:
    """Fit the outputs of a converted model's layers to the float model's, in place.

    It need not be calibrated: the ranges of all activations are found, too. Rounding is learned
    where the quantizer can (see `ricciq.quant.weight.WeightQuantizer.can_learn_rounding`); other
    weights are rounded to the nearest level as before. Layers whose weight a parent uses itself are
    left out. A layer that runs more than once is fitted where it runs first. What a module keeps in
    its attributes from one layer to the next is not kept for each image.

    Args:
        model: converted; its latent weights become levels.
        teacher: the float model that it was made of.
        norms: the BatchNorm that each discrete layer took in, by dotted names.
        batches: (B, C, H, W) images on the model's device; `IMAGES` in all are enough.
        steps: optimizer steps for each layer.
        journal: shows progress.
        candidates: how many scales to try for each range; see `choose_range`.

    Raises:
        InputError: there is no image, activations are not finite, or images take different paths
            through the model.
    """
    shown = list(batches)
    if not shown:
        raise InputError("there is no image to calibrate on; give at least one batch")
    chunks = torch.split(torch.cat(shown), CHUNK)
    layers = {
        name: layer
        for name in norms
        if isinstance(layer := model.get_submodule(name), QuantLayer) and layer.lent_to is None
    }
    with evaluating(model), evaluating(teacher):
        goals = _run_float(teacher, layers, norms, chunks, journal)
        sizes = torch.tensor([len(chunk) for chunk in chunks], dtype=torch.float64)
        with journal.bar("rounding", len(layers)) as advance:
            fitting = _Fitting(model, layers, goals, sizes / sizes.sum(), steps, candidates)
            try:
                fitting.run(chunks, advance)
            except PartedError as error:
                paths = [fitting.names[at[1]] if at else "the end" for at in error.names]
                raise InputError(
                    f"images take different paths through the model, to {listed(set(paths))}; set "
                    "quantization.reconstruction to 0"
                ) from None


@dataclass
class _Goal:
    """What a layer of the float network returns, behind its BatchNorm.

    Attributes:
        places: for each chunk, the outputs whose values are kept.
        values: for each chunk, (n, channels) these values.
        means: for each chunk, (channels,) the mean, float64.
    """

    places: list[Place] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)


def _run_float(
    teacher: nn.Module,
    layers: Mapping[str, QuantLayer],
    norms: Mapping[str, str | None],
    chunks: Sequence[Tensor],
    journal: Journal,
) -> dict[str, _Goal]:
    """What each layer's counterpart returns where it runs first."""
    goals = {name: _Goal() for name in layers}
    due: set[str] = set()
    chance = torch.Generator().manual_seed(0)

    def watch(name: str) -> Callable[..., None]:
        goal, layer, norm_name = goals[name], layers[name], norms[name]
        norm = teacher.get_submodule(norm_name) if norm_name else None
        factor, shift = affine(norm) if isinstance(norm, BatchNorm) else (1.0, 0.0)
        channel = layer.channel_axis

        def note(module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ARG001
            if name not in due:
                return
            due.remove(name)
            mean = _channel_means(output, channel) * factor + shift
            check_finite(mean, name)
            goal.means.append(mean)
            if layer.weight_quantizer.can_learn_rounding:
                chosen = random_places(output.shape, channel, POSITIONS * count, chance)
                place = tuple(index.to(output.device) for index in chosen)
                goal.places.append(place)
                goal.values.append((values_at(output, channel, place) * factor + shift).float())

        return note

    with ExitStack() as hooks, journal.bar("float network", len(chunks)) as advance:
        for name in layers:
            handle = teacher.get_submodule(name).register_forward_hook(watch(name))
            hooks.callback(handle.remove)
        for chunk in chunks:
            due.update(layers)
            count = len(chunk)
            teacher(chunk)
            advance(lambda: "")
    return goals


class _Fitting:
    """The pass of the discrete network; each layer is handled once, where all chunks reach it."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, QuantLayer],
        goals: Mapping[str, _Goal],
        shares: Tensor,
        steps: int,
        candidates: int,
    ) -> None:
        self.model, self.shares, self.steps, self.candidates = model, shares, steps, candidates
        self.goals = {layers[name]: goal for name, goal in goals.items()}
        self.names = {module: name for name, module in model.named_modules()}
        self.lockstep = Lockstep(self._handle)
        self.done: set[Any] = set()

    def run(self, chunks: Sequence[Tensor], advance: Callable[[Callable[[], str]], None]) -> None:
        """Fit all layers to chunks of images."""
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
            self.lockstep.run(self.model, chunks)

    def _meet(self, step: Callable[..., Any], module: nn.Module, value: Tensor) -> Any:
        key = (step, module)
        return None if key in self.done else self.lockstep.meet(key, value)

    def _handle(self, key: tuple[Callable[..., Any], nn.Module], values: list[Tensor]) -> list[Any]:
        step, module = key
        self.done.add(key)
        return [step(module, values)] * len(values)

    def _before_quantizer(self, module: ActivationQuantizer, args: tuple[Tensor]) -> None:
        self._meet(self._find_range, module, args[0])

    def _before_layer(self, layer: QuantLayer, args: tuple[Tensor]) -> None:
        # The input is quantized after this, but rounding needs the range.
        if layer.input_quantizer is not None:
            self._meet(self._find_range, layer.input_quantizer, args[0])
        self._meet(self._learn, layer, args[0])

    def _after_layer(self, layer: QuantLayer, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        if _bias(layer) is None or (self._correct_bias, layer) in self.done:
            return output
        channel = layer.channel_axis % output.dim()
        means = _channel_means(output, channel)
        change: Tensor = self._meet(self._correct_bias, layer, means)
        return output + change.view(-1, *[1] * (output.dim() - 1 - channel))

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
        self.advance(lambda: self.names[layer])

    def _correct_bias(self, layer: QuantLayer, means: list[Tensor]) -> Tensor:
        """Subtract the mean error of each channel from the bias; returns what was added."""
        bias = _bias(layer)
        assert bias is not None
        errors = torch.stack(self.goals[layer].means) - torch.stack(means)
        change = (self.shares.to(errors.device) @ errors).to(bias)
        bias += change
        return change


def _bias(layer: QuantLayer) -> Tensor | None:
    """The bias behind the layer's BatchNorm."""
    return layer.bias if layer.norm is None else layer.norm.bias


def _channel_means(output: Tensor, channel: int) -> Tensor:
    """(channels,) as float64, to be added up over chunks."""
    axes = [axis for axis in range(output.dim()) if axis != channel % output.dim()]
    return output.mean(axes).double()
