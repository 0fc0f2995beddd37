"""One optimizer step after another: forward, backward, correct, step. Nothing touches a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Self, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.profiler import record_function

from ricciq.convert.rewrite import quantized_layers
from ricciq.data.loader import Batch
from ricciq.errors import RecipeError
from ricciq.estimators.apply import Attachment, Correction, DiscreteWeight
from ricciq.estimators.metric_flow import Geometry
from ricciq.quant.calibration import calibrate
from ricciq.recipe import Recipe
from ricciq.system.distributed import World
from ricciq.training.losses import feature_distance, loss_function
from ricciq.training.memory import is_out_of_memory
from ricciq.training.metrics import Codes, Tally
from ricciq.training.optim import WithFeatures, optimizer_and_schedule
from ricciq.training.oscillation import Damping, Freezing
from ricciq.training.stages import Progression

Pictures = Callable[[], Iterable[Tensor]]
"""Makes batches (B, C, H, W) to calibrate on, of training pictures as they are, always the same."""


def discrete_weights(model: nn.Module) -> list[DiscreteWeight]:
    """The weights of a converted model's discrete layers, with their quantizers."""
    return [
        DiscreteWeight(name, layer.latent, layer.weight_quantizer)
        for name, layer in quantized_layers(model).items()
    ]


def half_precision(device: torch.device) -> torch.dtype:
    """What a device computes mixed precision in: float16 only where it has no bfloat16."""
    lacking = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if lacking else torch.bfloat16


class Trainer:
    """Takes batches and changes a converted, calibrated model.

    The estimator is attached to the model until `end`, which also ends a block ``with Trainer(…)``.

    A profiler of torch's sees the phases of a step by name: ``forward``, ``backward``,
    ``correction`` and ``optimizer``.

    Args:
        model: on ``device``; stays usable by itself.
        recipe: schedule, mixed precision, compilation and seed.
        correction: what happens to the gradients between backward and step.
        device: where to compute.
        batches_per_epoch: of each process.
        teacher: the float model to distil from, on ``device``.
        world: the processes that average their gradients.

    Raises:
        RecipeError: timm knows no such optimizer or schedule, or the model cannot recompute its
            activations.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        correction: Correction,
        device: torch.device,
        batches_per_epoch: int,
        teacher: nn.Module | None = None,
        world: World | None = None,
    ) -> None:
        self.model, self.device, self.world = model, device, world or World()
        self.settings, self.correction, self.seed = recipe.training, correction, recipe.seed
        self.scale_search = recipe.quantization.scale_search
        self.updates_per_epoch = -(-batches_per_epoch // self.settings.grad_accum_steps)
        self.updates = self.updates_per_epoch * self.settings.epochs
        self.damping = Damping(self.settings.damping, self.settings.damping_form)
        self.weights = discrete_weights(model)
        self.freezing = Freezing(self.weights, self.settings.freezing)
        self.codes = Codes(self.weights)
        # Everything with tensors that a step changes, but for the optimizer.
        self.changing = nn.ModuleDict(
            {"model": model, "freezing": self.freezing, "codes": self.codes}
        )
        self.ema: ModelEmaV3 | None = None
        if self.settings.ema is not None:
            self.ema = ModelEmaV3(model, self.settings.ema)
            self.changing["ema"] = self.ema
        stages = self.settings.progressive, self.settings.epochs
        self.progressions = [
            Progression(net, *stages) for net in dict.fromkeys([model, self.outcome])
        ]
        self.optimizer, self.schedule = optimizer_and_schedule(
            model, self.settings, self.updates_per_epoch
        )
        on_cuda = device.type == "cuda"
        self.amp = on_cuda if recipe.amp is None else recipe.amp
        self.dtype = half_precision(device)
        scaled = self.amp and self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        if self.settings.grad_checkpointing:
            recompute_activations(model, True)
        self.alone = model
        if self.settings.distill_features and teacher is not None:
            self.alone, teacher = WithFeatures(model), WithFeatures(teacher)
        self.parallel: DistributedDataParallel | None = None
        if self.world.size > 1:
            self.parallel = DistributedDataParallel(self.alone)
        self.eager: nn.Module = self.parallel or self.alone
        self.forward = self.eager
        self.teacher = self.eager_teacher = teacher
        if on_cuda if recipe.compile is None else recipe.compile:
            self.forward = cast(nn.Module, torch.compile(self.eager))
            self.teacher = teacher and cast(nn.Module, torch.compile(teacher))
        self.averages = list(model.buffers())
        self.saved_averages = [torch.empty_like(buffer) for buffer in self.averages]
        self.geometry: dict[str, Geometry] = {}
        # At last, so that a trainer that cannot be made leaves nothing on the model.
        self.attachment = Attachment(model, correction, self.outcome)
        self.activations = self.attachment.activations

    def begin_epoch(self) -> None:
        """Put the model into training; with ``freeze_bn``, its BatchNorms into evaluation."""
        self.model.train()
        self.geometry = {}
        if self.settings.freeze_bn:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def step(self, batches: Sequence[Batch], tally: Tally, update: int, measure: bool) -> bool:
        """Forward, backward, correct, damp, step, freeze.

        Args:
            batches: whose gradients are added up, each weighted by its pictures.
            tally: what is counted.
            update: how many optimizer steps were taken before. Whatever a step draws by chance
                follows from the seed, this number and the process.
            measure: leave the geometry in `geometry`.

        Returns:
            Whether the gradients were finite; if not, nothing has changed.
        """
        progress = update / self.updates
        chance = random.Random(f"step {self.seed} {update} {self.world.rank}")
        torch.manual_seed(chance.getrandbits(63))
        if self.activations is not None:
            self.activations.advance(progress)
        # A BatchNorm takes its batch into its averages in the forward pass, a NaN too, for good.
        self._copy(self.averages, self.saved_averages)
        with self._measuring() if measure else nullcontext({}) as cosines:
            seen = self._backward(batches, self.eager if measure else self.forward)

        self.scaler.unscale_(self.optimizer)
        # One number says whether all gradients are finite; a step with a NaN would ruin the run.
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = bool(nn.utils.get_total_norm(gradients).isfinite())
        if finite:
            if measure:
                self.geometry = self._measured(progress, cosines)
            with record_function("correction"):
                self.correction(self.weights, progress)
            self.damping(self.weights, progress)
            if self.settings.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
            with record_function("optimizer"), self.correction.step_bound.around(self.weights):
                self.scaler.step(self.optimizer)
            self.freezing(progress)
            if self.ema is not None:
                self.ema.update(self.model)
        else:
            self._copy(self.saved_averages, self.averages)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step_update(update + 1)
        tally.bad += not finite
        for loss, logits, targets in seen if finite else ():
            tally.add(loss, logits, targets)
        return finite

    def _measuring(self) -> AbstractContextManager[dict[nn.Module, float]]:
        """Around a step that leaves the geometry; see `ActivationCorrection.measuring`."""
        if self.activations is not None and self.correction.target == "activations":
            return self.activations.measuring()
        return nullcontext({})

    def _backward(
        self, batches: Sequence[Batch], forward: nn.Module
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Add up gradients; loss, logits and targets of each batch."""
        pictures = sum(len(targets) for _, targets in batches)
        seen = []
        for number, (images, targets) in enumerate(batches, start=1):
            last = number == len(batches)
            alone = self.parallel is not None and not last
            with cast(DistributedDataParallel, self.parallel).no_sync() if alone else nullcontext():
                with record_function("forward"):
                    loss, logits, labels = self._loss(images, targets, forward)
                share = self.scaler.scale(loss * (len(targets) / pictures))
                with record_function("backward"):
                    share.backward()  # type: ignore[no-untyped-call]
            seen.append((loss.detach(), logits, labels))
        return seen

    def _loss(
        self, images: Tensor, targets: Tensor, forward: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        unlabelled = bool(targets.min() < 0)
        targets = targets.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.amp):
            logits, features = _parted(forward(images))
            taught, known = None, None
            if self.teacher is not None:
                with torch.no_grad():
                    taught, known = _parted(self.teacher(images))
                    targets = taught.argmax(1) if unlabelled else targets
        loss = loss_function(logits, targets, taught, self.settings)
        if features is not None and known is not None:
            loss = loss + self.settings.distill_features * feature_distance(features, known)
        return loss, logits.detach(), targets

    @property
    def outcome(self) -> nn.Module:
        """What is judged and saved: the model, or the moving average of its weights."""
        return self.model if self.ema is None else self.ema.module

    @property
    def stage(self) -> int:
        """Which widths the quantizers have; see `Progression`."""
        return self.progressions[0].stage

    def set_stage(self, stage: int) -> bool:
        """Give the quantizers the widths of a stage; whether they had others."""
        changed = [progression.enter(stage) for progression in self.progressions]
        if any(changed) and self.activations is not None:
            self.activations.set_slopes()
        return any(changed)

    def enter(self, epoch: int, pictures: Pictures) -> None:
        """Make ready for an epoch, counted from 0: in a new stage all steps are found anew."""
        progression = self.progressions[0]
        if not self.set_stage(progression.stage_of(epoch)):
            return
        progression.fit_weights(self.scale_search)
        calibrate(self.model, (x.to(self.device) for x in pictures()), self.scale_search)
        if self.ema is not None:
            self.ema.set(self.model)  # type: ignore[no-untyped-call]

    def reestimate(self, pictures: Pictures) -> None:
        """Take the BatchNorm averages of the outcome anew, where the recipe wants it."""
        if self.settings.reestimate_bn:
            torch.manual_seed(self.seed)  # a model may drop something by chance
            update_bn(pictures(), self.outcome, self.device)

    def share_averages(self) -> None:
        """Give every process the BatchNorm averages of the first, those that are saved."""
        for buffer in dict.fromkeys([*self.averages, *self.outcome.buffers()]):
            self.world.share(buffer)

    def __enter__(self) -> Self:
        """The trainer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Call `end`, whatever ended the block."""
        self.end()

    def end(self) -> None:
        """Leave the model as others use it: without the estimator, with its activations kept."""
        self.attachment.detach()
        if self.settings.grad_checkpointing:
            recompute_activations(self.model, False)

    def fits(self, batch: Batch) -> bool:
        """Whether the memory is enough for a batch's gradients; the model stays as it is.

        It is tried as the last step of an epoch does it, which needs most: the geometry is measured
        and nothing is compiled.
        """
        compiled, self.teacher = self.teacher, self.eager_teacher
        self.optimizer.zero_grad()  # what a step that failed left
        self._copy(self.averages, self.saved_averages)
        moments = []
        try:
            if not self.optimizer.state:  # it makes its moments in the first step
                parameters = list(self.model.parameters())
                moments = [torch.empty_like(p) for p in parameters for _ in range(self.moments)]
            # Not through DistributedDataParallel: other processes are not trying.
            with self._measuring():
                self._backward([batch], self.alone)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            del moments
            self.teacher = compiled
            self.optimizer.zero_grad()
            self._copy(self.saved_averages, self.averages)
        return True

    @staticmethod
    @torch.no_grad()
    def _copy(source: list[Tensor], target: list[Tensor]) -> None:
        if source:  # a model without BatchNorm may have no buffer
            torch._foreach_copy_(target, source)

    def _measured(self, progress: float, cosines: Mapping[nn.Module, float]) -> dict[str, Geometry]:
        """The geometry of each layer; where only its inputs' gradients turn, how far they do."""
        geometry = self.correction.measure(self.weights, progress)
        for name, layer in quantized_layers(self.model).items():
            quantizer = layer.input_quantizer
            if name in geometry and quantizer is not None and quantizer in cosines:
                geometry[name] = geometry[name]._replace(mismatch_cosine=cosines[quantizer])
        return geometry

    @property
    def moments(self) -> int:
        """Tensors that the optimizer keeps for a weight: Adam and its like two, others one."""
        return 2 if "betas" in self.optimizer.defaults else 1

    def predict(self, images: Tensor) -> Tensor:
        """Logits of the outcome in evaluation mode."""
        logits: Tensor = self.outcome.eval()(images.to(self.device))
        return logits


def _parted(answer: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Logits in float32, and features if the model gives them."""
    if isinstance(answer, Tensor):
        return answer.float(), None
    logits, features = answer
    return logits.float(), features


def recompute_activations(model: nn.Module, wanted: bool) -> None:
    """Save memory in training by recomputing what the backward pass needs; timm's own switch.

    Raises:
        RecipeError: the model has none.
    """
    try:
        model.set_grad_checkpointing(wanted)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise RecipeError(
            "training.grad_checkpointing = true is nothing this model of timm can do; remove it "
            "and lower --batch-size"
        ) from None
