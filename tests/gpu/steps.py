"""The time of a training step, of every variant that `tests/benchmarks/train_step.py` knows."""

from __future__ import annotations

from typing import Any

from parts import Context, Tell
from train_step import measure, parser, table


def resnet50(context: Context, tell: Tell) -> None:
    """W2 A2, batch 256: all variants, compiled and not."""
    plain = ["float", "ricci", "brevitas"]
    names = [f"{name}, compiled" for name in ("float", "ste", "ricci")]
    names = plain if context.tiny else [*names, *plain, "ricci and teacher, compiled"]
    _measure(context, tell, "resnet50", 256, (2, 2), names)


def mobilenet(context: Context, tell: Tell) -> None:
    """W4 A4, batch 256."""
    _short(context, tell, "mobilenetv2_100")


def deit(context: Context, tell: Tell) -> None:
    """W4 A4, batch 256."""
    _short(context, tell, "deit_small_patch16_224")


def _short(context: Context, tell: Tell, model: str) -> None:
    names = ["ricci"] if context.tiny else ["ricci, compiled", "float, compiled", "ste, compiled"]
    _measure(context, tell, model, 256, (4, 4), names)


def _measure(
    context: Context,
    tell: Tell,
    model: str,
    batch: int,
    bits: tuple[int, int],
    names: list[str],
) -> None:
    options = parser().parse_args([model])
    options.batch, options.bits, options.only = batch, bits, names
    options.device, options.amp, options.profile = context.device, True, True
    options.rounds, options.steps, options.at_once = 5, 8, len(names)
    options.patience, options.until = 0.8 * context.seconds, 0.85 * context.seconds
    if context.tiny:
        options.batch, options.rounds, options.steps, options.at_once = 2, 1, 1, 2
        options.model, options.size, options.amp = "digits_resnet8", (1, 8, 8), False
        if model.startswith("deit"):
            options.model, options.size, options.batch = "test_vit", (3, 160, 160), 1

    def shown(found: dict[str, Any]) -> None:
        tell({**found, **_figures(found), "lines": list(table(found))})

    found = measure(options, shown)
    if broken := {k: why for k, why in found["failed"].items() if "not installed" not in why}:
        for name, why in broken.items():
            print(f"{name}: {why}")
        raise RuntimeError(f"{', '.join(broken)} failed")


def _figures(found: dict[str, Any]) -> dict[str, float]:
    """Those that goals are set for."""
    ratios, figures = found["ratios"], {}
    if ratio := ratios.get("ricci, compiled / float, compiled"):
        figures |= {"time_of_float": ratio["time"], "memory_of_float": ratio["memory"]}
    if ratio := ratios.get("ricci, compiled / ste, compiled"):
        figures["correction"] = 1 - 1 / ratio["time"]
    if ratio := ratios.get("brevitas / ricci, compiled"):
        figures["brevitas"] = ratio["time"]
    profile = found.get("profiles", {}).get("ricci, compiled")
    if profile and "waits" in profile:
        figures["waits"] = profile["waits"]
    return figures
