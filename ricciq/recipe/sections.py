"""The sections of a recipe: keys, defaults, bounds, and descriptions below each key.

`ricciq recipes keys` prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)

from ricciq.data.augmentation import Augmentation
from ricciq.data.preprocessing import LARGEST_SIDE
from ricciq.estimators.catalog import CATALOG, DEFAULT, Target, all_settings
from ricciq.quant.catalog import (
    ACTIVATIONS,
    DEFAULT_ACTIVATIONS,
    DEFAULT_WEIGHTS,
    WEIGHTS,
    check_width,
    described,
)

if TYPE_CHECKING:
    from ricciq.quant.config import QuantizerConfig
    from ricciq.quant.grid import Bits

    WeightQuantizerName = str
    ActQuantizerName = str
else:
    WeightQuantizerName = Literal[tuple(WEIGHTS)]
    ActQuantizerName = Literal[tuple(ACTIVATIONS)]

WeightBits = Literal[1, 2, 3, 4, 5, 6, 7, 8, 32, "ternary", "auto"]
ActBits = Literal[1, 2, 3, 4, 5, 6, 7, 8, 32]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe; unknown keys are errors, so that a typing mistake is not ignored."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ModelSection(Section):
    """Which network, and where its float weights come from."""

    name: str = ""
    """A timm model, with its tag or without, such as resnet50.a1_in1k."""
    checkpoint: Path | None = None
    """File with its float weights; without it, those that timm knows are loaded."""
    pretrained: bool = True
    """Load the weights that timm knows, where no checkpoint is given; else they are random."""


class DataSection(Section):
    """Which pictures, and how they are prepared."""

    name: str = ""
    """A folder, digits, torch/NAME, wds/NAME or hfds/NAME, as given to --data."""
    dir: Path | None = None
    """Root of the files of torch/NAME and wds/NAME, or cache of hfds/NAME."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 64
    """Images in a batch of each process; auto takes the largest that fits, up to 256."""
    workers: Count = 0
    """Processes that decode images; 0 decodes in the training process."""
    input_size: Annotated[int, Field(ge=1, le=LARGEST_SIDE)] | None = None
    """Height and width in pixels; without it, the model's own."""
    train_samples: Annotated[int, Field(ge=1)] | None = None
    """Train on this many images, the same ones in every run."""
    holdout: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the training images that is held out to choose the best epoch."""
    calibration_batches: Annotated[int, Field(ge=1)] = 8
    """Batches of training images that first scales are found on."""
    augmentation: Augmentation = Augmentation()
    """How training images vary."""

    @property
    def known_batch_size(self) -> int:
        """That of the recipe; one that fits nearly everywhere as long as it is to be found out."""
        return 64 if self.batch_size == "auto" else self.batch_size


class QuantizationSection(Section):
    """Widths in bits, of both in the first and last layer too, and the kinds of quantizers."""

    weight_bits: WeightBits = 4
    """Bits of weights; 32 leaves them float, auto finds them within a budget."""
    average_bits: Annotated[float, Field(ge=1, le=8)] | None = None
    """With weight_bits auto: the average over all layers but the first and the last."""
    max_bytes: Annotated[ByteSize, Field(ge=1)] | None = None
    """With weight_bits auto: the largest file, such as 4MB."""
    act_bits: ActBits = 4
    """Bits of activations; 32 leaves them float."""
    edge_bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8
    """Bits of the first and the last layer."""
    weight_quantizer: WeightQuantizerName = Field(
        default=DEFAULT_WEIGHTS, description=f"Quantizer of weights: {described(WEIGHTS)}."
    )
    act_quantizer: ActQuantizerName = Field(
        default=DEFAULT_ACTIVATIONS,
        description=f"Quantizer of activations: {described(ACTIVATIONS)}.",
    )
    weight_norm: bool = False
    """Keep the norm of each output channel's weight while training turns it."""
    scale_search: Annotated[int, Field(ge=1)] = 100
    """First scales that are tried for the least squared error; 1 clips nothing."""
    reconstruction: Count = 200
    """Steps a layer of learned rounding, where there is no training."""

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        budgets = [self.average_bits, self.max_bytes].count(None)
        if budgets != (1 if self.weight_bits == "auto" else 2):
            raise ValueError(
                "weight_bits auto goes with one budget, average_bits or max_bytes, and a budget "
                "with it; give both or neither"
            )
        if self.weight_bits == 32 and self.act_bits != 32:
            raise ValueError(
                f"float weights with {self.act_bits}-bit activations have no integer kernel; give "
                "--bits 32, or fewer weight bits"
            )
        for key, name, width in (
            ("weight_quantizer", self.weight_quantizer, self.planned_bits),
            ("act_quantizer", self.act_quantizer, self.act_bits),
        ):
            for bits in (width, self.edge_bits):
                if bits != 32:
                    check_width(key, name, bits)
        return self

    @property
    def planned_bits(self) -> Bits:
        """What a plan begins with: 8 where the bits are to be found."""
        return 8 if self.weight_bits == "auto" else self.weight_bits

    @property
    def config(self) -> QuantizerConfig:
        """Which quantizers."""
        from ricciq.quant.config import QuantizerConfig

        names = self.weight_quantizer, self.act_quantizer
        return QuantizerConfig(*names, self.weight_norm, self.scale_search)


class _MethodSection(Section):
    """The gradient estimator, and settings that differ from what its name stands for.

    The settings, those of all estimators, are added from `ricciq.estimators.catalog`; whether the
    named one has them is checked by `ricciq.estimators.registry.named_estimator`.
    """

    name: str = DEFAULT
    target: Target | None = Field(
        default=None,
        description="Whose gradients are corrected; by default, what the method is for.",
    )

    @model_validator(mode="before")
    @classmethod
    def _old_spelling(cls, values: Any) -> Any:
        """Read ``on``, which ``target`` was called; YAML 1.1 takes it for true without quotes."""
        if not isinstance(values, Mapping):
            return values
        others = {key: value for key, value in values.items() if key is not True and key != "on"}
        if len(others) == len(values):
            return values
        old = [value for key, value in values.items() if key is True or key == "on"]
        given = [value for value in (others.get("target"), *old) if value is not None]
        if any(value != given[0] for value in given):
            names = " and ".join(str(value) for value in given)
            raise ValueError(f"target and on, its old name, differ ({names}); give target alone")
        return {**others, "target": given[0] if given else None}

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the estimator that the name stands for."""
        return self.model_dump(exclude={"name", "target"}, exclude_none=True)

    @property
    def corrects(self) -> Target:
        """Whose gradients are corrected: those of `target`, or what the method is meant for."""
        return self.target or CATALOG[self.name].target


if TYPE_CHECKING:
    MethodSection = _MethodSection
else:
    MethodSection = create_model(
        "MethodSection",
        __base__=_MethodSection,
        __doc__=_MethodSection.__doc__,
        __module__=__name__,
        name=(
            Literal[tuple(CATALOG)],
            Field(DEFAULT, description="The gradient estimator; see the table of methods."),
        ),
        **{
            name: (annotation | None, Field(None, description=description))
            for name, (annotation, description) in all_settings().items()
        },
    )


class TrainingSection(Section):
    """The fine-tuning schedule; ``opt`` and ``sched`` are timm's factory names."""

    epochs: Count = 20
    """Passes over the training images; 0 quantizes without training."""
    opt: str = "adamw"
    """timm's name of an optimizer."""
    lr: Positive = 2e-3
    """Learning rate at the top of the schedule."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay; scales, biases and norms are exempt."""
    sched: str = "cosine"
    """timm's name of a schedule."""
    warmup_epochs: Count = 0
    """Epochs in which the learning rate rises."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the schedule."""
    clip_grad: Positive | None = None
    """Largest norm of all gradients together."""
    grad_accum_steps: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients are added up for an optimizer step."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass, where the model can: saves memory."""
    freeze_bn: bool = False
    """BatchNorm keeps the statistics of the float model."""
    save_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes between saved states within an epoch."""
    label_smoothing: Share = 0.0
    """Label smoothing of the loss on labels."""
    scale_lr: Positive = 1.0
    """Factor of the learning rate for scales."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, which is then judged and exported."""
    reestimate_bn: bool = False
    """Estimate BatchNorm statistics anew after each epoch, on calibration images."""
    progressive: tuple[Annotated[int, Field(ge=2, le=8)], ...] = ()
    """Widths to train at first, as [8, 4], each for an equal share of the epochs."""
    damping: Annotated[float, Field(ge=0)] = 0.0
    """Strength at the end of training of a pull toward the quantization levels."""
    damping_form: Literal["l2", "lne"] = "l2"
    """Form of that pull: squared error, or LNE divergence."""
    freezing: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fix weights whose code changes back and forth in more than this share of steps."""
    distill: Share = 0.5
    """Share of the float model's answers in the loss; the rest is the labels'."""
    distill_features: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a loss on the direction of the features before the head."""
    temperature: Positive = 1.0
    """Temperature that softens both answers in distillation."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} leaves no epoch of {self.epochs}; lower it"
            )
        if self.freeze_bn and self.reestimate_bn:
            raise ValueError("freeze_bn keeps what reestimate_bn replaces; remove one of them")
        stages = self.progressive
        if any(later >= earlier for earlier, later in pairwise(stages)):
            raise ValueError(f"progressive {list(stages)} does not fall; write it as [8, 4]")
        if stages and self.freezing is not None:
            raise ValueError("freezing fixes codes that progressive changes; remove one of them")
        if 0 < self.epochs <= len(stages):
            raise ValueError(
                f"progressive {list(stages)} and the last stage need {len(stages) + 1} epochs, "
                f"not {self.epochs}; give more"
            )
        return self
