"""Sensitivity of the network's output to the width of each layer's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from ricciq.convert.plan import Plan
from ricciq.convert.rewrite import convert, quantized_layers
from ricciq.errors import InputError
from ricciq.evaluation import evaluating
from ricciq.layers.base import QuantLayer
from ricciq.quant.activation import ActivationQuantizer
from ricciq.quant.calibration import check_finite
from ricciq.quant.config import QuantizerConfig
from ricciq.quant.weight import WeightQuantizer
from ricciq.system.journal import Journal

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
"""The widths to choose from. In a file, 7 bits take as much space as 8."""
AT_ONCE = 8
"""Images of a backward pass: what every layer is given and returns for them is in memory."""


class Sensitivity(NamedTuple):
    """What each width of one layer costs.

    Attributes:
        name: name of the layer.
        parameters: number of its weights.
        divergence: in nats, by width; it does not increase with the width.
    """

    name: str
    parameters: int
    divergence: dict[int, float]


class _Probed:
    """A float copy of a model in which the weights of single layers can be quantized."""

    def __init__(self, model: nn.Module, plan: Plan, config: QuantizerConfig) -> None:
        self.net = convert(copy.deepcopy(model), plan, config).requires_grad_(False)
        self.config, self.widths = config, widths_of(config)
        for module in self.net.modules():
            if isinstance(module, ActivationQuantizer):
                module.leave_float()
        self._standardize: dict[nn.Module, nn.Module] = {}
        for layer in quantized_layers(self.net).values():
            self._standardize[layer] = layer.weight_quantizer.layer_standardize
            layer.pass_weight_through(self._standardize[layer])

    def layer(self, name: str) -> QuantLayer:
        """A layer by name."""
        return cast(QuantLayer, self.net.get_submodule(name))

    def quantizers(self, layer: QuantLayer) -> dict[int, WeightQuantizer]:
        """A calibrated quantizer of the layer's weight for each width."""
        standardize = self._standardize[layer]
        return {
            bits: self.config.quantizer_for(layer.latent, bits, standardize).eval()
            for bits in self.widths
        }

    @contextmanager
    def quantized(self, layer: QuantLayer, quantizer: nn.Module) -> Iterator[None]:
        """Quantize the weight of a layer within a block."""
        layer.pass_weight_through(quantizer)
        try:
            yield
        finally:
            layer.pass_weight_through(self._standardize[layer])


def _monotonic(layer: QuantLayer, name: str, lost: Mapping[int, float]) -> Sensitivity:
    """More levels make a layer worse only by chance."""
    divergence: dict[int, float] = {}
    for bits, value in lost.items():
        divergence[bits] = min([max(value, 0.0), *divergence.values()])
    return Sensitivity(name, layer.latent.numel(), divergence)


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    plan: Plan,
    names: Sequence[str],
    config: QuantizerConfig,
    batches: Sequence[Tensor],
    journal: Journal,
) -> list[Sensitivity]:
    """Quantize the weights of one layer at a time to each width, everything else in float.

    Args:
        model: the float model; it is not changed.
        plan: the layers to quantize.
        names: the layers to measure.
        config: the quantizers.
        batches: (B, C, H, W) calibration images on the model's device.
        journal: shows progress.

    Returns:
        For each layer and width, the mean Kullback-Leibler divergence of the softmax outputs from
        those of the float model, as in ZeroQ (Cai et al. 2020, arXiv 2001.00281).
    """
    probed = _Probed(model, plan, config)
    found = []
    steps = len(names) * len(probed.widths)
    with evaluating(probed.net), journal.bar("sensitivity", steps) as advance:
        expected = [F.log_softmax(probed.net(images).float(), 1) for images in batches]
        for name in names:
            layer = probed.layer(name)
            lost: dict[int, float] = {}
            for bits, quantizer in probed.quantizers(layer).items():
                with probed.quantized(layer, quantizer):
                    lost[bits] = _divergence(probed.net, batches, expected)
                advance(lambda name=name: name)  # type: ignore[misc]
            found.append(_monotonic(layer, name, lost))
    return found


def estimate_sensitivity(
    model: nn.Module,
    plan: Plan,
    names: Sequence[str],
    config: QuantizerConfig,
    batches: Sequence[Tensor],
    journal: Journal,
) -> list[Sensitivity]:
    """What `measure_sensitivity` measures, from one backward pass over the images.

    To second order, the divergence is half the mean of (gᵀ d)², where d is the change of the
    outputs of a layer by quantizing its weight, and g the gradient of the log-likelihood of a class
    that is drawn from the softmax outputs: the Fisher information in the direction of d. FIT
    (Zandonati et al. 2022, arXiv 2210.08502) takes its diagonal over the weights instead, which
    leaves out how errors of the same channel add up.

    Args:
        model: the float model; it is not changed.
        plan: the layers to quantize.
        names: the layers to estimate.
        config: the quantizers.
        batches: (B, C, H, W) calibration images on the model's device. What layers return for an
            image must be together along their first axis, as (B, ...) or (B * tokens, ...).
        journal: shows progress.

    Returns:
        For each layer and width, the estimated divergence.

    Raises:
        InputError: activations are not finite, or do not depend on the images as autograd sees it.
    """
    probed = _Probed(model, plan, config)
    parents = {layer.name: layer.parent for layer in plan.layers}
    layers = {name: probed.layer(name) for name in names}
    # A layer whose weight a parent uses does not run itself.
    runs = {name: probed.net.get_submodule(parents[name] or name) for name in names}
    lost = {name: dict.fromkeys(probed.widths, 0.0) for name in names}
    chance = torch.Generator().manual_seed(0)
    parts = [part for images in batches for part in torch.split(images, AT_ONCE)]
    steps = len(layers) + len(parts)
    with evaluating(probed.net), journal.bar("sensitivity", steps) as advance:
        quantizers = {}
        for name, layer in layers.items():
            quantizers[name] = probed.quantizers(layer)
            advance(lambda name=name: name)  # type: ignore[misc]
        for images in parts:
            calls = _gradients(probed.net, runs, images, chance)
            for name, layer in layers.items():
                for bits, quantizer in quantizers[name].items():
                    with probed.quantized(layer, quantizer):
                        change = torch.zeros(len(images), device=images.device)
                        for call in calls[name]:
                            change = change + call.change(runs[name], len(images))
                    lost[name][bits] += float(change.double().square().sum()) / 2
            advance(lambda: "")
    count = sum(map(len, batches))
    return [
        _monotonic(layer, name, {bits: value / count for bits, value in lost[name].items()})
        for name, layer in layers.items()
    ]


class _Call(NamedTuple):
    """A call of a module, and the gradient of the log-likelihood with respect to its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    gradient: Tensor

    @torch.no_grad()
    def change(self, module: nn.Module, images: int) -> Tensor:
        """How much the log-likelihood of each image changes, to first order: (images,)."""
        output = _tensor(module(*_copied(self.args), **self.kwargs))
        return ((output - self.output) * self.gradient).reshape(images, -1).sum(1)


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)


def _tensor(output: Any) -> Tensor:
    """The first tensor of what a module returns."""
    first: Tensor = output if isinstance(output, Tensor) else tree_leaves(output)[0]
    return first


def _gradients(
    net: nn.Module, runs: Mapping[str, nn.Module], images: Tensor, chance: torch.Generator
) -> dict[str, list[_Call]]:
    """The calls of some modules for a batch of images, by name."""
    given: list[tuple[Any, ...]] = []
    seen: list[tuple[str, tuple[Any, ...], dict[str, Any], Tensor]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        given.append(_copied(args))  # the module or what follows may change them in place

    def after(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ARG001
            found = _tensor(output)
            check_finite(found, name)
            if not found.requires_grad:
                raise InputError(
                    f"no gradient reaches {name}, so the sensitivity of its bits cannot be "
                    "estimated; set quantization.sensitivity to measured"
                )
            seen.append((name, given.pop(), kwargs, found))
            if output is found:
                return found.clone()  # which may be changed in place
            return tree_map(lambda x: found.clone() if x is found else x, output)

        return hook

    with ExitStack() as hooks, torch.enable_grad():
        for name, module in runs.items():
            for handle in (
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after(name), with_kwargs=True),
            ):
                hooks.callback(handle.remove)
        logits = net(images.detach().requires_grad_().clone()).float()
        check_finite(logits, "its end")
        shares = logits.detach().softmax(1)
        drawn = torch.multinomial(shares.cpu(), 1, generator=chance)[:, 0].to(logits.device)
        likelihood = F.log_softmax(logits, 1).gather(1, drawn[:, None]).sum()
        outputs = [output for *_, output in seen]
        gradients = torch.autograd.grad(likelihood, outputs, allow_unused=True)
    calls: dict[str, list[_Call]] = {name: [] for name in runs}
    for (name, args, kwargs, output), gradient in zip(seen, gradients, strict=True):
        if gradient is not None:  # what it returned is used
            calls[name].append(_Call(args, kwargs, output.detach(), gradient))
    return calls


def widths_of(config: QuantizerConfig) -> list[int]:
    """The widths of `WIDTHS` that the quantizers of weights support."""
    return [bits for bits in WIDTHS if bits in config.weight_widths]


def _divergence(net: nn.Module, batches: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    lost = 0.0
    for images, wanted in zip(batches, expected, strict=True):
        found = F.log_softmax(net(images).float(), 1)
        lost += F.kl_div(found, wanted, reduction="sum", log_target=True).item()
    return lost / sum(map(len, batches))
