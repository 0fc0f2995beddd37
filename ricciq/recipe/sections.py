"""The sections of a recipe: keys with types, bounds and defaults, and a description below each.

`ricciq recipes keys` prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    JsonValue,
    create_model,
    model_validator,
)

from ricciq.data.augmentation import Augmentation
from ricciq.data.preprocessing import LARGEST_SIDE, Interpolation
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


def _unquoted(value: Any) -> Any:
    """The number in quotes, which pydantic reads everywhere but among other values."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


WeightBits = Annotated[
    Literal[1, 2, 3, 4, 5, 6, 7, 8, 32, "ternary", "auto"], BeforeValidator(_unquoted)
]
ActBits = Annotated[Literal[1, 2, 3, 4, 5, 6, 7, 8, 32], BeforeValidator(_unquoted)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe. An unknown key is an error, so that a typing mistake is not ignored."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
    )


class ModelSection(Section):
    """The model, and where its float weights come from."""

    name: str = ""
    """timm's name of the model, with or without a tag, such as resnet50.a1_in1k."""
    checkpoint: Path | None = None
    """File of float weights; without a value, timm's pretrained weights are loaded."""
    pretrained: bool = True
    """Load timm's pretrained weights if no checkpoint is given; false takes random weights."""
    kwargs: dict[str, JsonValue] = {}
    """More arguments of timm's constructor, such as global_pool."""
    fuse: bool | None = None
    """Merge the branches of blocks as in RepVGG; without a value, if weights are loaded."""

    @property
    def has_weights(self) -> bool:
        """Whether weights are loaded."""
        return self.pretrained or self.checkpoint is not None

    @property
    def is_fused(self) -> bool:
        """Whether the branches of blocks are merged."""
        return self.has_weights if self.fuse is None else self.fuse


class DataSection(Section):
    """The data set, and how its images are loaded."""

    name: str = ""
    """A folder, digits, torch/NAME, wds/NAME or hfds/NAME, as for --data."""
    dir: Path | None = None
    """Folder of the files of torch/NAME or wds/NAME, or cache of hfds/NAME, as for --data-dir."""
    class_map: Path | None = None
    """File that names the model's outputs in their order, as for --class-map."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 64
    """Images in a batch of each process; auto takes the largest that fits in memory, up to 256."""
    workers: Count | None = None
    """Processes that decode images; without a value, as many as cores, or 0 if images are few."""
    input_size: Side | tuple[Side, Side] | None = None
    """Height and width of the input in pixels, or one number for both; by default the model's."""
    mean: Annotated[tuple[float, ...], Field(min_length=1, max_length=3)] | None = None
    """Mean of each channel, of pixels from 0 to 1; without a value, that of the weights."""
    std: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=3)] | None = None
    """Standard deviation of each channel; without a value, that of the weights."""
    crop_pct: Annotated[float, Field(ge=0.1, le=2)] | None = None
    """Share of the resized image that the crop keeps; without a value, that of the weights."""
    interpolation: Interpolation | None = None
    """Method of resizing; without a value, that of the weights."""
    train_samples: Annotated[int, Field(ge=1)] | None = None
    """Train on a fixed, stratified subset of this many images; without a value, on all."""
    holdout: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the training images to hold out; the best epoch is chosen on them."""
    calibration_batches: Annotated[int, Field(ge=1)] = 8
    """Batches of training images to calibrate quantizers on."""
    augmentation: Augmentation = Augmentation()
    """Random augmentation of training images."""

    @model_validator(mode="after")
    def _one_value_for_each_channel(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) == 2:
                raise ValueError(f"{name} has 2 values; give one, or one for each of 3 channels")
        return self

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The keys of `Preprocessing` that have a value."""
        keys = {"mean", "std", "crop_pct", "interpolation"}
        return self.model_dump(include=keys, exclude_none=True)

    @property
    def known_batch_size(self) -> int:
        """The batch size of the recipe, or 64 as long as auto has not found one."""
        return 64 if self.batch_size == "auto" else self.batch_size


class QuantizationSection(Section):
    """Bits of weights and activations, and the kinds of quantizers."""

    weight_bits: WeightBits = 4
    """Bits of weights; 32 keeps them in float, auto chooses them by layer within a budget."""
    average_bits: Annotated[float, Field(ge=1, le=8)] | None = None
    """With weight_bits auto: average bits over all layers but the first and the last."""
    max_bytes: Annotated[ByteSize, Field(ge=1)] | None = None
    """With weight_bits auto: largest size of the ONNX file, such as 4MB."""
    sensitivity: Literal["fisher", "measured"] = "fisher"
    """With weight_bits auto: estimate what bits cost, or measure it, which takes far longer."""
    act_bits: ActBits = 4
    """Bits of activations; 32 keeps them in float."""
    edge_bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8
    """Bits of weights and activations of the first and the last layer."""
    weight_quantizer: WeightQuantizerName = Field(
        default=DEFAULT_WEIGHTS, description=f"Quantizer of weights: {described(WEIGHTS)}."
    )
    act_quantizer: ActQuantizerName = Field(
        default=DEFAULT_ACTIVATIONS,
        description=f"Quantizer of activations: {described(ACTIVATIONS)}.",
    )
    weight_norm: bool = False
    """Keep the norm of each output channel's weight constant in training."""
    scale_search: Annotated[int, Field(ge=1)] = 100
    """Initial scales tried for the least squared error, 11 at most for long rows; 1 clips none."""
    reconstruction: Count = 200
    """Steps of learned rounding (AdaRound) for each layer, if epochs is 0."""
    reconstruction_images: Annotated[int, Field(ge=1)] = 256
    """Training images that layers are fitted to, if epochs is 0; all are in memory at a layer."""

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        budgets = [self.average_bits, self.max_bytes].count(None)
        if budgets != (1 if self.weight_bits == "auto" else 2):
            raise ValueError(
                "weight_bits auto needs one budget, average_bits or max_bytes, and a budget needs "
                "weight_bits auto; give both or neither"
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
        """Bits of weights to plan with: 8 as long as auto has not chosen them."""
        return 8 if self.weight_bits == "auto" else self.weight_bits

    @property
    def config(self) -> QuantizerConfig:
        """Which quantizers."""
        from ricciq.quant.config import QuantizerConfig

        names = self.weight_quantizer, self.act_quantizer
        return QuantizerConfig(*names, self.weight_norm, self.scale_search)


class _MethodSection(Section):
    """The gradient estimator, and settings that differ from its defaults.

    The settings of all estimators are added from `ricciq.estimators.catalog`;
    `ricciq.estimators.registry.named_correction` checks whether the named one has them.
    """

    name: str = DEFAULT
    target: Target | None = Field(
        default=None,
        description="Whose gradients to correct; without a value, the method's default.",
    )

    @model_validator(mode="before")
    @classmethod
    def _old_spelling(cls, values: Any) -> Any:
        """Read ``on``, the old name of ``target``; unquoted, YAML 1.1 reads it as true."""
        if not isinstance(values, Mapping):
            return values
        others = {key: value for key, value in values.items() if key is not True and key != "on"}
        if len(others) == len(values):
            return values
        old = [value for key, value in values.items() if key is True or key == "on"]
        given = [value for value in (others.get("target"), *old) if value is not None]
        if any(value != given[0] for value in given):
            names = " and ".join(str(value) for value in given)
            raise ValueError(f"target and on, its old name, differ ({names}); give target only")
        return {**others, "target": given[0] if given else None}

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that differ from the estimator's defaults."""
        return self.model_dump(exclude={"name", "target"}, exclude_none=True)

    @property
    def corrects(self) -> Target:
        """Whose gradients are corrected: `target`, or the method's default."""
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
    """Fine-tuning; ``opt`` and ``sched`` are names of timm's factories."""

    epochs: Count = 20
    """Passes over the training images; 0 quantizes without training."""
    float_epochs: Count | None = None
    """Epochs of the float model before that; without a value as many for a new head, else 0."""
    opt: str = "adamw"
    """timm's name of the optimizer."""
    lr: Positive = 2e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay, except of scales, biases and normalization layers."""
    sched: str = "cosine"
    """timm's name of the learning rate schedule."""
    warmup_epochs: Count = 0
    """Epochs of learning rate warm-up."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the schedule."""
    clip_grad: Positive | None = None
    """Clip the global norm of the gradients to this; without a value, do not clip."""
    grad_accum_steps: Annotated[int, Field(ge=1)] = 1
    """Batches to accumulate gradients over for an optimizer step."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory (gradient checkpointing)."""
    freeze_bn: bool = False
    """Keep the BatchNorm statistics of the float model."""
    save_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes between saves of the training state within an epoch."""
    label_smoothing: Share = 0.0
    """Label smoothing of the loss on labels."""
    scale_lr: Positive = 1.0
    """Learning rate of the quantizers' scales, as a factor of lr."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, which is evaluated and exported."""
    reestimate_bn: bool = False
    """Re-estimate BatchNorm statistics on the calibration images after each epoch."""
    progressive: tuple[Annotated[int, Field(ge=2, le=8)], ...] = ()
    """Bits to train at before the final ones, such as [8, 4]; all stages have equal epochs."""
    damping: Annotated[float, Field(ge=0)] = 0.0
    """Final strength of a penalty that pulls weights toward their levels; 0 is off."""
    damping_form: Literal["l2", "lne"] = "l2"
    """Form of that penalty: squared error or LNE divergence."""
    freezing: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Freeze weights whose code oscillates in more than this share of steps."""
    distill: Share = 0.5
    """Weight of distillation from the float model's logits; the rest is the loss on labels."""
    distill_features: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a distillation loss on the direction of the features before the head."""
    temperature: Positive = 1.0
    """Temperature of the logits in distillation."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}; "
                "lower it"
            )
        if self.freeze_bn and self.reestimate_bn:
            raise ValueError(
                "freeze_bn and reestimate_bn contradict each other; remove one of them"
            )
        stages = self.progressive
        if any(later >= earlier for earlier, later in pairwise(stages)):
            raise ValueError(
                f"progressive {list(stages)} is not in descending order; write it as [8, 4]"
            )
        if stages and self.freezing is not None:
            raise ValueError(
                "freezing fixes the codes that progressive changes; remove one of them"
            )
        if 0 < self.epochs <= len(stages):
            raise ValueError(
                f"progressive {list(stages)} needs at least {len(stages) + 1} epochs, one for each "
                f"stage, not {self.epochs}; raise epochs"
            )
        return self


class WrittenForSection(Section):
    """The data set that a shipped recipe was written for: where it is taken without being named."""

    classes: Annotated[int, Field(ge=1)] | None = None
    """Number of classes of the data set that a shipped recipe was written for."""
    images: Annotated[int, Field(ge=1)] | None = None
    """Number of its training images."""
