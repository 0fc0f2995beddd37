"""A training step in float, in ricciq and in Brevitas: time, images per second, peak memory.

    python tests/benchmarks/train_step.py resnet18 --batch 32
    python tests/benchmarks/train_step.py resnet50 --batch 256 --device cuda --amp --profile

Each variant runs in its own process, so that its peak memory can be measured. In every round each
variant takes some steps while the others wait. A ratio is the median over rounds of two times of
the same round. All but Brevitas run `ricciq.training.step.Trainer.step`: every time includes its
checks and its optimizer (SGD with momentum). The step of Brevitas is forward, backward and
optimizer. Brevitas takes part if it is installed (`pip install brevitas`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import util
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "support"))

VARIANTS = {
    "float": (),
    "float, compiled": ("compile",),
    "ste": ("discrete",),
    "ste, compiled": ("discrete", "compile"),
    "ricci": ("discrete", "ricci"),
    "ricci, compiled": ("discrete", "ricci", "compile"),
    "ricci and teacher": ("discrete", "ricci", "teacher"),
    "ricci and teacher, compiled": ("discrete", "ricci", "teacher", "compile"),
    "brevitas": ("brevitas",),
}
CLASSES, WARM_UP = 1000, 3
PROCESSES = multiprocessing.get_context("fork")
"""This process never uses a GPU itself: its forks could not use it then."""
RATIOS = [
    ("ricci, compiled", "float, compiled"),
    ("ricci", "float"),
    ("ricci, compiled", "ste, compiled"),
    ("ricci", "ste"),
    ("brevitas", "ricci, compiled"),
    ("brevitas", "ricci"),
]
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def ours(options: argparse.Namespace, traits: Sequence[str]) -> Callable[[], None]:
    """A step of ricciq's trainer on a converted model, or a float one."""
    import timm
    import torch

    import ricciq.models.factory  # noqa: F401  registers the nets with timm
    from ricciq.convert.plan import plan_conversion
    from ricciq.convert.rewrite import convert
    from ricciq.quant.calibration import calibrate
    from ricciq.recipe import Recipe
    from ricciq.training.loop import correction_of
    from ricciq.training.metrics import Tally
    from ricciq.training.step import Trainer

    device = torch.device(options.device)
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=CLASSES).to(device)
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(options.batch, *options.size, device=device)
    targets = torch.randint(CLASSES, (options.batch,))  # as loaders give them
    teacher = None
    if "teacher" in traits:
        teacher = timm.create_model(options.model, num_classes=CLASSES).to(device).eval()
        teacher = teacher.to(memory_format=torch.channels_last)
    if "discrete" in traits:
        convert(model, plan_conversion(model.eval(), images[:2], *options.bits))
        calibrate(model, [images[:8]])
    method = "ricci" if "ricci" in traits else "ste"
    recipe = Recipe().override(
        {
            "method.name": method,
            "training": {"opt": "momentum", "lr": 1e-4, "epochs": 1},
            "compile": "compile" in traits,
            "amp": options.amp,
        }
    )
    trainer = Trainer(model, recipe, correction_of(recipe), device, 1_000_000, teacher)
    trainer.begin_epoch()
    tally, taken = Tally(), iter(range(1_000_000))

    def step() -> None:
        trainer.step([(images, targets)], tally, next(taken), measure=False)

    return step


def brevitas(options: argparse.Namespace) -> Callable[[], None]:
    """A step of the same model in Brevitas: per-channel weight scales, learned input scales."""
    import timm
    import torch
    from brevitas.quant import Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
    from brevitas_layers import replace_layers
    from torch import nn

    import ricciq.models.factory  # noqa: F401  registers the nets with timm

    def quantizers(index: int, count: int) -> dict[str, Any]:
        weight_bits, act_bits = (8, 8) if index in (0, count - 1) else options.bits
        return {
            "weight_quant": Int8WeightPerChannelFloat,
            "weight_bit_width": weight_bits,
            "input_quant": Uint8ActPerTensorFloat,
            "input_bit_width": act_bits,
            # Scales are learned after so many steps of statistics, each of which costs a sort.
            "input_collect_stats_steps": 1,
        }

    device = torch.device(options.device)
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=CLASSES)
    replace_layers(model, quantizers)
    model = model.to(device).to(memory_format=torch.channels_last).train()
    images = torch.randn(options.batch, *options.size, device=device)
    images = images.to(memory_format=torch.channels_last)
    targets = torch.randint(CLASSES, (options.batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)

    def step() -> None:
        amp = torch.autocast(device.type, torch.bfloat16) if options.amp else nullcontext()
        with amp:
            loss = nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def serve(
    orders: Connection, places: Any, device: Any, options: argparse.Namespace, variant: str
) -> None:
    """Prepare a variant, then time or profile steps as ordered.

    Args:
        orders: receives orders, a name and a number of steps, and sends what was measured.
        places: semaphore for preparing: limits how many variants do so at a time.
        device: lock for computing on the device, whose memory is enough for one variant.
        options: of the command line.
        variant: one of `VARIANTS`.
    """
    try:
        import torch

        torch.set_num_threads(options.threads)
        traits = VARIANTS[variant]
        with places:
            step = brevitas(options) if "brevitas" in traits else ours(options, traits)
            with _holding(device, "compile" in traits):
                for _ in range(WARM_UP):
                    step()
                _let_memory_go(options.device)
        orders.send({"ready": True})
        while order := orders.recv():
            what, steps = order
            orders.send((timed if what == "time" else profiled)(step, steps, options.device))
            _let_memory_go(options.device)
    except Exception:
        orders.send({"error": traceback.format_exc()})


@contextmanager
def _holding(device: Any, compiles: bool) -> Iterator[None]:
    """Hold the device from now on, or from the end of the first compilation.

    Several variants can thus compile at a time, with almost no memory of the device.
    """
    held = False

    def take(*_: object) -> None:
        nonlocal held
        if not held:
            held = device.acquire()

    if compiles:
        import torch._dynamo
        import torch._functorch.config as aot

        if hasattr(aot, "force_non_lazy_backward_lowering"):  # before the device is held, not after
            aot.force_non_lazy_backward_lowering = True
        torch._dynamo.callback_handler.register_end_callback(take)
    else:
        take()
    try:
        yield
    finally:
        if compiles:
            torch._dynamo.callback_handler.remove_end_callback(take)
        if held:
            device.release()


def _let_memory_go(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def timed(step: Callable[[], None], steps: int, device: str) -> dict[str, Any]:
    """Milliseconds per step, without waiting between steps, and the peak memory."""
    import torch

    on_cuda = device.startswith("cuda")
    if on_cuda:  # one more: it allocates the memory that was released
        step()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if on_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if on_cuda else peak
    return {"ms": 1000 * seconds / steps, "peak_bytes": peak}


def profiled(step: Callable[[], None], steps: int, device: str) -> dict[str, Any]:
    """The slowest kernels, with their share of a step, and the launches and waits of the host.

    On a CPU operators are listed instead of kernels, and there are no launches or waits.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_cuda = device.startswith("cuda")
    step()
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            step()
        if on_cuda:
            torch.cuda.synchronize()
    events = seen.key_averages()
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    own = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    kernels = [e for e in events if e.device_type == kind and getattr(e, own) > 0]
    whole = sum(getattr(e, own) for e in kernels)
    slowest = sorted(kernels, key=lambda e: getattr(e, own), reverse=True)[:10]
    found: dict[str, Any] = {
        "kernels_ms": whole / steps / 1000,
        "slowest": [
            {
                "name": event.key[:120],
                "share": getattr(event, own) / whole,
                "ms": getattr(event, own) / steps / 1000,
                "calls": event.count / steps,
            }
            for event in slowest
        ],
    }
    if on_cuda:
        found["launches"] = sum(e.count for e in events if e.key in LAUNCHES) / steps
        found |= _waits(step, steps)
    return found


def _waits(step: Callable[[], None], steps: int) -> dict[str, Any]:
    """How often the host waits for the device in a step, and where."""
    import torch

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(steps):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "synchronizing" in str(w.message)]
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
    return {"waits": len(waits) / steps, "waits_at": {k: n / steps for k, n in places.items()}}


class Variant:
    """A variant's process, and what it has measured so far.

    Attributes:
        why: why it failed, with a traceback; empty if it did not.
    """

    def __init__(self, name: str, options: argparse.Namespace, places: Any, device: Any) -> None:
        self.name, self.why = name, ""
        self.times: list[float] = []
        self.peak = 0
        self.orders, theirs = PROCESSES.Pipe()
        arguments = (theirs, places, device, options, name)
        self.process = PROCESSES.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def answer(self, patience: float | None = None) -> dict[str, Any]:
        """What the process sends next; empty if it failed or took more than ``patience`` s."""
        if self.why:
            return {}
        try:
            if not self.orders.poll(patience):
                self.process.kill()
                self.why = f"not ready after {patience:.0f} s"
                return {}
            values: dict[str, Any] = self.orders.recv()
        except EOFError:
            self.process.join()
            values = {"error": f"its process ended with {self.process.exitcode}"}
        self.why = values.get("error", "")
        return {} if self.why else values

    def order(self, what: str, steps: int) -> dict[str, Any]:
        """Let the process time or profile steps, and wait for the result."""
        if not self.why:
            self.orders.send((what, steps))
        return self.answer()

    def end(self) -> None:
        """Let the process end."""
        if self.process.is_alive() and not self.why:
            self.orders.send(None)
            self.process.join()


def measure(
    options: argparse.Namespace, tell: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Time the variants in turns.

    Args:
        options: of the command line.
        tell: receives the results so far after every round, in case the run is cut off.
    """
    names = options.only or list(VARIANTS)
    missing = {}
    if "brevitas" in names and util.find_spec("brevitas") is None:
        names = [name for name in names if name != "brevitas"]
        missing["brevitas"] = "brevitas is not installed"
    places, device = PROCESSES.BoundedSemaphore(options.at_once), PROCESSES.Lock()
    variants = [Variant(name, options, places, device) for name in names]
    started = time.monotonic()
    for variant in variants:
        patience = options.patience
        if patience is not None:
            patience = max(0.0, patience - (time.monotonic() - started))
        variant.answer(patience)
        print(f"{variant.name}: {variant.why or 'ready'}", file=sys.stderr)
    settings = {
        name: getattr(options, name) for name in ("model", "batch", "size", "device", "bits", "amp")
    }

    profiles: dict[str, Any] = {}

    def outcome() -> dict[str, Any]:
        return settings | _outcome(variants, options.batch, missing) | {"profiles": profiles}

    for number in range(options.rounds):
        for variant in variants:
            if values := variant.order("time", options.steps):
                variant.times.append(values["ms"])
                variant.peak = max(variant.peak, values["peak_bytes"])
        tell(outcome())
        if options.profile and number == 0:  # early, in case there is no time for all rounds
            for variant in variants:
                if variant.name in ("ricci, compiled", "ricci"):
                    profiles[variant.name] = variant.order("profile", options.steps)
            tell(outcome())
        if options.until is not None and time.monotonic() - started > options.until:
            break
    for variant in variants:
        variant.end()
    return outcome()


def _outcome(variants: Sequence[Variant], batch: int, missing: dict[str, str]) -> dict[str, Any]:
    done = {variant.name: variant for variant in variants if variant.times}
    rows = {}
    for name, variant in done.items():
        ms = median(variant.times)
        rows[name] = {
            "ms": ms,
            "images_per_second": 1000 * batch / ms,
            "peak_bytes": variant.peak,
            "times_ms": variant.times,
        }
    ratios = {}
    for name, other in RATIOS:
        if name in done and other in done:
            pairs = zip(done[name].times, done[other].times, strict=True)
            ratios[f"{name} / {other}"] = {
                "time": median(a / b for a, b in pairs),
                "memory": done[name].peak / done[other].peak,
            }
    failed = missing | {variant.name: variant.why for variant in variants if variant.why}
    return {"rows": rows, "ratios": ratios, "failed": failed}


def table(found: dict[str, Any]) -> Iterator[str]:
    """The lines of what `measure` found."""
    yield f"| {found['model']}, batch {found['batch']}, {found['device']} | ms | images/s | GB |"
    yield "|---|---|---|---|"
    for name, row in found["rows"].items():
        rate = row["images_per_second"]
        yield f"| {name} | {row['ms']:.1f} | {rate:.0f} | {row['peak_bytes'] / 1e9:.2f} |"
    for name, ratio in found["ratios"].items():
        yield f"{name}: {ratio['time']:.3f} x time, {ratio['memory']:.2f} x memory"
    for name, why in found["failed"].items():
        yield f"{name} failed: {why.strip().splitlines()[-1]}"
    for name, profile in found.get("profiles", {}).items():
        if not profile:
            continue
        host = ""
        if "launches" in profile:
            host = f", {profile['launches']:.0f} launches, the host waits {profile['waits']:.1f} x"
        yield f"{name}: {profile['kernels_ms']:.1f} ms of kernels a step{host}"
        for kernel in profile["slowest"]:
            yield f"  {100 * kernel['share']:.1f} %  {kernel['ms']:.2f} ms  {kernel['name'][:80]}"
        for place, times in profile.get("waits_at", {}).items():
            yield f"  waits {times:.1f} x at {place}"


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("model")
    made.add_argument("--batch", type=int, default=32)
    made.add_argument("--size", type=int, nargs=3, default=(3, 224, 224))
    made.add_argument("--bits", type=int, nargs=2, default=(2, 2), help="of weights, activations")
    made.add_argument("--device", default="cpu")
    made.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--rounds", type=int, default=10)
    made.add_argument("--steps", type=int, default=1, help="steps in a turn")
    made.add_argument("--at-once", type=int, default=1, help="how many variants prepare at a time")
    made.add_argument("--patience", type=float, help="seconds within which variants must be ready")
    made.add_argument("--until", type=float, help="seconds after which no round begins")
    made.add_argument("--profile", action="store_true", help="show the Ricci step's kernels")
    made.add_argument("--only", nargs="+", choices=VARIANTS, help="variants; all if left out")
    made.add_argument("--json", type=Path, help="file to write")
    return made


def main() -> None:
    options = parser().parse_args()
    found = measure(options)
    print("\n".join(table(found)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
