"""The gradient estimators by name: class, settings, reference. Does not import torch.

To add one, write a module with its class and an entry here. The recipe's ``method`` section, the
help of ``--method``, shell completion and the table in the README are generated from the entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ricciq.errors import listed

Target = Literal["weights", "activations", "both"]
Coordinate = Literal["residual", "weight"]
Block = Literal["row", "kernel"] | int
Flow = Literal["linear", "euler", "none"]
Rule = Literal["natural", "pullback", "parallel", "project", "staircase"]
MetricRule = Literal["natural", "pullback", "parallel"]
Schedule = Literal["constant", "linear", "cosine", "growing"]


@dataclass(frozen=True)
class Settings:
    """The settings of an estimator: the base of its class, which validates them.

    Types and bounds are those of the annotations.

    Raises:
        ValueError: a value has another type or is out of bounds; one sentence says what to give.
    """

    def __post_init__(self) -> None:
        """Validate every value."""
        for name, setting in self.described().items():
            value = getattr(self, name)
            try:
                setting.adapter.validate_python(value)
            except ValidationError:
                raise ValueError(f"{name} is {value!r}; give {setting.allowed}.") from None

    @classmethod
    def described(cls) -> dict[str, Setting]:
        """Type, bounds and description of every setting, by name."""
        return _described(cls)  # type: ignore[arg-type]  # takes it for an instance


class Setting(NamedTuple):
    """One setting of an estimator.

    Attributes:
        annotation: type and bounds, as a pydantic annotation.
        description: one line for help and tables.
        allowed: the valid values, in words.
        adapter: validates a value without converting it.
    """

    annotation: Any
    description: str
    allowed: str
    adapter: TypeAdapter[Any]


@cache
def _described(kind: type[Settings]) -> dict[str, Setting]:
    hints = get_type_hints(kind, include_extras=True)
    config = ConfigDict(strict=True, allow_inf_nan=False)
    found = {}
    for name in (each.name for each in fields(kind)):
        described = [part.description for part in get_args(hints[name])[1:] if part.description]
        adapter: TypeAdapter[Any] = TypeAdapter(hints[name], config=config)
        found[name] = Setting(
            hints[name], " ".join(described), _allowed(adapter.json_schema()), adapter
        )
    return found


def _allowed(schema: Mapping[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(_allowed(each) for each in schema["anyOf"] if each != {"type": "null"})
    if "enum" in schema:
        return listed(schema["enum"])
    bounds = [
        f"{word} {schema[key]:g}"
        for key, word in [
            ("minimum", "from"),
            ("exclusiveMinimum", "above"),
            ("maximum", "to"),
            ("exclusiveMaximum", "and below"),
        ]
        if key in schema
    ]
    return " ".join(["an integer" if schema["type"] == "integer" else "a finite number", *bounds])


@dataclass(frozen=True)
class FlowSettings(Settings):
    """The settings of `ricciq.estimators.ricci_flow.RicciFlow`."""

    coordinate: Annotated[
        Coordinate,
        Field(description="Coordinate of a weight: its residual, or its value in scales."),
    ] = "residual"
    block: Annotated[
        Literal["row", "kernel"] | Annotated[int, Field(ge=1)],
        Field(description="Weights that share a metric: the row, a kernel, or so many neighbours."),
    ] = "row"
    flow: Annotated[
        Flow, Field(description="How the metric flows: in closed form, by one Euler step, or not.")
    ] = "linear"
    correction: Annotated[
        Rule,
        Field(description="Rule of the correction; parallel and project use no flow."),
    ] = "pullback"
    time: Annotated[float, Field(ge=0, description="Time of the flow.")] = 0.1
    schedule: Annotated[
        Schedule,
        Field(description="How the time changes during training."),
    ] = "constant"
    rho: Annotated[
        float,
        Field(
            gt=0, lt=1, description="Bound on sigma, the squared norm of tanh(tau r) over a block."
        ),
    ] = 0.9
    tau_max: Annotated[float, Field(gt=0, description="Bound on the curvature parameter tau.")] = (
        1.0
    )
    strength: Annotated[float, Field(description="Coefficient of the correction project.")] = 0.9
    max_codes: Annotated[
        int, Field(ge=2, description="Levels of activations up to which staircase corrects.")
    ] = 256
    trust: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(description="Half cells that a weight may move at most in an optimizer step."),
    ] = None


@dataclass(frozen=True)
class ElementwiseScalingSettings(Settings):
    """The settings of `ricciq.estimators.elementwise.ElementwiseScaling`."""

    delta: Annotated[
        float, Field(ge=0, le=2, description="Strength of ewgs, where w − ŵ is counted in scales.")
    ] = 0.2


@dataclass(frozen=True)
class SoftQuantizationSettings(Settings):
    """The settings of `ricciq.estimators.elementwise.SoftQuantization`."""

    alpha: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="Shape of dsq's staircase: near 0, all slope is at the thresholds.",
        ),
    ] = 0.2


@dataclass(frozen=True)
class Entry:
    """A method name and the estimator that it means.

    Attributes:
        path: "module:Class", with the module inside `ricciq.estimators`.
        line: what becomes of a gradient G taken at discrete values, for help and tables.
        reference: arXiv number of the paper.
        target: whose gradients are corrected if the recipe does not say.
        settings: the settings of the class.
        values: settings that differ from the class's defaults under this name.
    """

    path: str
    line: str
    reference: str | None = None
    target: Target = "weights"
    settings: type[Settings] = Settings
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """The value of every setting under this name."""
        return {**vars(self.settings()), **self.values}

    def load(self) -> type[Any]:
        """Import the estimator's class, and torch with it."""
        module, name = self.path.split(":")
        return cast(type[Any], getattr(import_module(f"ricciq.estimators.{module}"), name))


CATALOG: dict[str, Entry] = {
    "ricci": Entry(
        "ricci_flow:RicciFlow",
        "G times the slope of the staircase of levels under the flow; see How it works",
        target="activations",
        settings=FlowSettings,
        values={"correction": "staircase", "time": 0.25, "max_codes": 4, "trust": 0.2},
    ),
    "ste": Entry(
        "straight_through:StraightThrough", "G: the straight-through estimator", "1308.3432"
    ),
    "ewgs": Entry(
        "elementwise:ElementwiseScaling",
        "G (1 + δ sign(G) (w − ŵ))",
        "2104.00903",
        settings=ElementwiseScalingSettings,
    ),
    "dsq": Entry(
        "elementwise:SoftQuantization",
        "G times the slope of a staircase of tanh",
        "1908.05033",
        settings=SoftQuantizationSettings,
    ),
    "ede": Entry(
        "elementwise:ErrorDecay",
        "G times a slope that sharpens while training goes on",
        "1909.10788",
    ),
    "lne": Entry(
        "ricci_flow:RicciFlow",
        "g(0)⁻¹ G with the LNE metric, without a flow",
        settings=FlowSettings,
        values={"flow": "none", "correction": "natural"},
    ),
    "project": Entry(
        "ricci_flow:RicciFlow",
        "G without nine tenths of its part along the residual: what the LNE flow does to long rows",
        settings=FlowSettings,
        values={"correction": "project"},
    ),
    "stochastic": Entry(
        "straight_through:StochasticRounding",
        "G, where training rounds up or down by chance, right on average",
        "1502.02551",
    ),
}
"""Every estimator, in the order in which they are shown; the first is the default."""
DEFAULT = next(iter(CATALOG))


def all_settings() -> dict[str, tuple[Any, str]]:
    """Annotation and description of the settings of all estimators, by name.

    Where two estimators have different settings of one name, the annotation allows both.
    """
    found: dict[str, tuple[Any, str]] = {}
    for kind in dict.fromkeys(entry.settings for entry in CATALOG.values()):
        for name, setting in kind.described().items():
            annotation, description = setting.annotation, setting.description
            if name in found:
                annotation = found[name][0] | annotation
                description = f"{found[name][1]}; {description}"
            found[name] = annotation, description
    return found


def named() -> str:
    """All names, as listed in a sentence: "a, b or c"."""
    return listed(CATALOG)
