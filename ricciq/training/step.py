"""The optimizer step: forward, backward, correct, step. No file is read or written here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.profiler import record_function

from ricciq.convert.rewrite import quantized_layers
from ricciq.data.loader import Batch
from ricciq.errors import RicciqError, is_out_of_memory, on_one_line
from ricciq.estimators.apply import Attachment, Correction, DiscreteWeight
from ricciq.estimators.metric_flow import Geometry
from ricciq.networks import check_logits, logits_of
from ricciq.quant.calibration import calibrate
from ricciq.recipe import Recipe
from ricciq.system.distributed import World
from ricciq.training.losses import feature_distance, loss_function
from ricciq.training.memory import halve_until, recompute_activations
from ricciq.training.metrics import Codes, Tally
from ricciq.training.moving_average import MovingAverage
from ricciq.training.optim import Featured, WithFeatures, optimizer_and_schedule
from ricciq.training.oscillation import Damping, Freezing
from ricciq.training.stages import Progression

CalibrationImages = Callable[[], Iterable[Tensor]]
"""Makes batches (B, C, H, W) of training images without augmentation, the same at every call."""


def discrete_weights(model: nn.Module) -> list[DiscreteWeight]:
    """The weights of a converted model's discrete layers with their quantizers, in order."""
    return [
        DiscreteWeight(name, layer.latent, layer.weight_quantizer)
        for name, layer in quantized_layers(model).items()
    ]


def half_precision(device: torch.device) -> torch.dtype:
    """The dtype of mixed precision on a device: float16 only where bfloat16 is missing."""
    lacking = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if lacking else torch.bfloat16


class Trainer:
    """Trains a converted, calibrated model, one optimizer step at a time.

    The estimator is attached to the model until `end`, which a block ``with Trainer(…)`` calls.

    The torch profiler shows the phases of a step as ``forward``, ``backward``, ``correction`` and
    ``optimizer``.

    Args:
        model: on ``device``; it can be used while it is trained.
        recipe: schedule, mixed precision, compilation and seed.
        correction: what happens to gradients after the backward pass.
        device: where to compute.
        batches_per_epoch: of each process.
        teacher: the float model to distil from, on ``device``.
        world: the processes that average their gradients.

    Raises:
        RecipeError: timm has no such optimizer or schedule, or the model does not support gradient
            checkpointing or has no features to distil.
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
        # Everything with tensors that a step changes, except the optimizer.
        self.changing = nn.ModuleDict(
            {"model": model, "freezing": self.freezing, "codes": self.codes}
        )
        self.ema: MovingAverage | None = None
        if self.settings.ema is not None:
            self.ema = MovingAverage(model, self.settings.ema)
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
        self.unwrapped = model
        if self.settings.distill_features and teacher is not None:
            self.unwrapped, teacher = WithFeatures(model), WithFeatures(teacher)
        self.parallel: DistributedDataParallel | None = None
        if self.world.size > 1:
            self.parallel = DistributedDataParallel(self.unwrapped)
        self.eager: nn.Module = self.parallel or self.unwrapped
        self.forward = self.eager
        self.teacher = self.eager_teacher = teacher
        if on_cuda if recipe.compile is None else recipe.compile:
            self.forward = cast(nn.Module, torch.compile(self.eager))
            self.teacher = teacher and cast(nn.Module, torch.compile(teacher))
        self.buffers = list(model.buffers())
        self.saved_buffers = [torch.empty_like(buffer) for buffer in self.buffers]
        self.geometry: dict[str, Geometry] = {}
        # Last, so that a trainer that cannot be made leaves nothing on the model.
        self.attachment = Attachment(model, correction, self.outcome)
        self.activations = self.attachment.activations

    def begin_epoch(self) -> None:
        """Put the model into training mode, with ``freeze_bn`` its BatchNorms into evaluation."""
        self.model.train()
        self.geometry = {}
        if self.settings.freeze_bn:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def step(self, batches: Sequence[Batch], tally: Tally, update: int, measure: bool) -> bool:
        """Forward, backward, correct, damp, step, freeze.

        Args:
            batches: their gradients are added up, each weighted by its number of images.
            tally: counts loss, hits and images.
            update: how many optimizer steps were taken before. All random numbers of a step follow
                from the seed, this number and the process.
            measure: measure the geometry and leave it in `geometry`.

        Returns:
            Whether the gradients were finite; if not, nothing has changed.

        Raises:
            RicciqError: there is not enough memory, and the message names the batch size that fits;
                or the model cannot be compiled.
        """
        try:
            return self._step(batches, tally, update, measure)
        except (RuntimeError, MemoryError) as error:
            if self.forward is not self.eager:
                _check_compiled(error)
            if not is_out_of_memory(error):
                raise
        raise self._too_large(batches[0])  # by now, what the step held is free

    def _step(self, batches: Sequence[Batch], tally: Tally, update: int, measure: bool) -> bool:
        progress = update / self.updates
        chance = random.Random(f"step {self.seed} {update} {self.world.rank}")
        torch.manual_seed(chance.getrandbits(63))
        if self.activations is not None:
            self.activations.advance(progress)
        # The forward pass updates BatchNorm averages: a NaN would stay in them for good.
        self._copy(self.buffers, self.saved_buffers)
        with self._measuring() if measure else nullcontext({}) as cosines:
            outputs = self._backward(batches, self.eager if measure else self.forward)

        self.scaler.unscale_(self.optimizer)
        # One number tells whether all gradients are finite; a step with a NaN would ruin the run.
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
                self.ema.update_parameters(self.model)
        else:
            self._copy(self.saved_buffers, self.buffers)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step_update(update + 1)
        tally.bad += not finite
        for loss, logits, targets in outputs if finite else ():
            tally.add(loss, logits, targets)
        return finite

    def _measuring(self) -> AbstractContextManager[dict[nn.Module, float]]:
        """The context of a step that is measured; see `ActivationCorrection.measuring`."""
        if self.activations is not None and self.correction.target == "activations":
            return self.activations.measuring()
        return nullcontext({})

    def _backward(
        self, batches: Sequence[Batch], forward: nn.Module
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Add up gradients; returns loss, logits and targets of each batch."""
        total = sum(len(targets) for _, targets in batches)
        outputs = []
        for number, (images, targets) in enumerate(batches, start=1):
            local = self.parallel is not None and number < len(batches)
            with cast(DistributedDataParallel, self.parallel).no_sync() if local else nullcontext():
                with record_function("forward"):
                    loss, logits, labels = self._loss(images, targets, forward)
                share = self.scaler.scale(loss * (len(targets) / total))
                with record_function("backward"):
                    share.backward()  # type: ignore[no-untyped-call]
            outputs.append((loss.detach(), logits, labels))
        return outputs

    def _loss(
        self, images: Tensor, targets: Tensor, forward: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.amp):
            logits, features = _split_output(forward(images))
            check_logits(logits, len(images))
            teacher_logits, teacher_features = None, None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_logits, teacher_features = _split_output(self.teacher(images))
                if targets.ndim == 1:  # without labels they are -1
                    targets = torch.where(targets < 0, teacher_logits.argmax(1), targets)
        loss = loss_function(logits, targets, teacher_logits, self.settings)
        if features is not None and teacher_features is not None:
            distance = feature_distance(features, teacher_features)
            loss = loss + self.settings.distill_features * distance
        return loss, logits.detach(), targets

    @property
    def outcome(self) -> nn.Module:
        """The network that is evaluated and saved: the model, or its moving average."""
        return self.model if self.ema is None else self.ema.module

    @property
    def stage(self) -> int:
        """The stage of progressive quantization, which decides the widths of the quantizers."""
        return self.progressions[0].stage

    def set_stage(self, stage: int) -> bool:
        """Set the widths of a stage; returns whether they differ from those before."""
        changed = [progression.enter(stage) for progression in self.progressions]
        if any(changed) and self.activations is not None:
            self.activations.set_slopes()
        return any(changed)

    def enter(self, epoch: int, images: CalibrationImages) -> None:
        """Prepare for an epoch: in a new stage, set the widths and calibrate all scales again.

        Args:
            epoch: counted from 0.
            images: what to calibrate on.
        """
        progression = self.progressions[0]
        if not self.set_stage(progression.stage_of(epoch)):
            return
        progression.fit_weights(self.scale_search)
        calibrate(self.model, (x.to(self.device) for x in images()), self.scale_search)
        if self.ema is not None:
            self.ema.restart(self.model)

    def reestimate(self, images: CalibrationImages) -> None:
        """Estimate the BatchNorm statistics of `outcome` again, if the recipe asks for it."""
        if self.settings.reestimate_bn:
            torch.manual_seed(self.seed)  # a model may have dropout
            update_bn(images(), self.outcome, self.device)

    def share_averages(self) -> None:
        """Copy the BatchNorm averages of the first process, which are saved, to every process."""
        for buffer in dict.fromkeys([*self.buffers, *self.outcome.buffers()]):
            self.world.share(buffer)

    def __enter__(self) -> Self:
        """Return the trainer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Call `end`."""
        self.end()

    def end(self) -> None:
        """Detach the estimator, and switch gradient checkpointing off."""
        self.attachment.detach()
        if self.settings.grad_checkpointing:
            recompute_activations(self.model, False)

    def fits(self, batch: Batch) -> bool:
        """Whether there is memory for the gradients of a batch. The model does not change.

        It computes them as the last step of an epoch does, which needs most: the geometry is
        measured and nothing is compiled.
        """
        compiled, self.teacher = self.teacher, self.eager_teacher
        self.optimizer.zero_grad()  # gradients of a step that failed
        self._copy(self.buffers, self.saved_buffers)
        moments = []
        try:
            if not self.optimizer.state:  # its moments are made in the first step
                parameters = list(self.model.parameters())
                moments = [torch.empty_like(p) for p in parameters for _ in range(self.moments)]
            # Not through DistributedDataParallel: the other processes do not take part.
            with self._measuring():
                self._backward([batch], self.unwrapped)
        except ValueError:  # a BatchNorm has no variance of a single value
            return False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            del moments
            self.teacher = compiled
            self.optimizer.zero_grad()
            self._copy(self.saved_buffers, self.buffers)
        return True

    def _too_large(self, batch: Batch) -> RicciqError:
        """The error of a batch that takes more memory than there is; it names a size that fits."""
        images, targets = batch
        half = len(targets) // 2
        size = halve_until(lambda n: self.fits((images[:n], targets[:n])), half)
        remedy = "choose a smaller model or input size"
        if size:
            steps = -(-len(targets) * self.settings.grad_accum_steps // size)
            remedy = f"give --batch-size {size}, and --grad-accum-steps {steps} for steps as large"
        return RicciqError(
            f"the memory of {self.device} is not enough for a step with batch size "
            f"{len(targets)}, {f'but {size} fitted' if size else 'nor for one image'}; {remedy}"
        )

    @staticmethod
    @torch.no_grad()
    def _copy(source: list[Tensor], target: list[Tensor]) -> None:
        if source:  # a model may have no buffers
            torch._foreach_copy_(target, source)

    def _measured(self, progress: float, cosines: Mapping[nn.Module, float]) -> dict[str, Geometry]:
        """The geometry of each layer, with the cosine of its inputs if only those are corrected."""
        geometry = self.correction.measure(self.weights, progress)
        for name, layer in quantized_layers(self.model).items():
            quantizer = layer.input_quantizer
            if name in geometry and quantizer is not None and quantizer in cosines:
                geometry[name] = geometry[name]._replace(mismatch_cosine=cosines[quantizer])
        return geometry

    @property
    def moments(self) -> int:
        """Tensors that the optimizer keeps for a weight: 2 for Adam and its variants, else 1."""
        return 2 if "betas" in self.optimizer.defaults else 1

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of `outcome` in evaluation mode, for images (B, C, H, W)."""
        return logits_of(self.outcome.eval()(images.to(self.device)))


def _split_output(output: object) -> tuple[Tensor, Tensor | None]:
    """Logits in float32, and features if the model returns them."""
    features = output.features if isinstance(output, Featured) else None
    return logits_of(output).float(), features


def _check_compiled(error: Exception) -> None:
    """Refuse a model that torch.compile fails on.

    Raises:
        RicciqError: the error comes from compiling.
    """
    from torch._dynamo.exc import TorchDynamoException  # a second to import, and is there by now

    if isinstance(error, TorchDynamoException):
        reason, _, _ = str(error).partition("Set TORCHDYNAMO_VERBOSE")
        raise RicciqError(
            f"torch.compile fails ({on_one_line(reason, 160)}); give --no-compile, or install what "
            "it lacks, such as a C++ compiler"
        ) from None
