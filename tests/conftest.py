"""What many tests start from, each made once a session.

A small residual network with every awkward layer, its exports, and a finished run.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from command import MAIN_JOB, ricciq
from filelock import FileLock
from garbage import collect_garbage_rarely
from torch import Tensor, nn
from torchlib import collect_once

from ricciq.convert.plan import Plan
from ricciq.convert.rewrite import quantize, quantized_layers
from ricciq.data.preprocessing import Preprocessing
from ricciq.deploy.export import export_onnx
from ricciq.deploy.inspection import Inspection, inspect_onnx
from ricciq.deploy.modules import deploy
from ricciq.quant.calibration import calibrate

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start
collect_once()
collect_garbage_rarely()
pytest.register_assert_rewrite("hostility")  # a helper that asserts, too

WIDTH = 9  # odd, so that packed rows do not fill their last byte


class TinyNet(nn.Module):
    """Two residual blocks with a grouped convolution, a strided shortcut and a linear head.

    There is no activation between the blocks, so the second reads signed numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.act1 = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.grouped = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=3)
        self.bn2 = nn.BatchNorm2d(WIDTH)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(WIDTH)
        self.conv4 = nn.Conv2d(WIDTH, 15, 3, 2, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(15)
        self.shortcut = nn.Conv2d(WIDTH, 15, 1, 2, bias=False)
        self.bn5 = nn.BatchNorm2d(15)
        self.act5 = nn.ReLU()
        self.fc = nn.Linear(15, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act1(self.bn1(self.conv1(x))))
        x = x + self.bn3(self.conv3(self.act2(self.bn2(self.grouped(x)))))
        y = self.bn4(self.conv4(x))
        y += self.bn5(self.shortcut(x))
        return self.fc(self.act5(y).mean((2, 3)))


def randomize_norms(model: nn.Module) -> None:
    """Trained-looking statistics, with BatchNorm weights of both signs, one zero, one tiny."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            with torch.no_grad():
                module.weight[:3] = torch.tensor([0.0, 1e-12, -0.7])


@dataclass(frozen=True)
class Export:
    """A model at the stages it goes through on its way to a file.

    `plan` is None for the float model; `deployed` is then the model itself.
    """

    plan: Plan | None
    model: nn.Module
    deployed: nn.Module
    path: Path
    inspection: Inspection


@pytest.fixture(scope="session")
def tiny_net() -> Callable[[], nn.Module]:
    """Makes the same small network with random BatchNorms, in evaluation mode."""

    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = TinyNet().eval()
            randomize_norms(model)
        return model

    return make


@pytest.fixture(scope="session")
def pictures() -> Tensor:
    """Sixteen pictures for the small network."""
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny_preprocessing() -> Preprocessing:
    return Preprocessing((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.fixture(scope="session")
def tiny_quantized(tiny_net, pictures) -> Callable[..., tuple[nn.Module, Plan]]:
    """Makes a calibrated network of the given widths; 32 and 32 make a float one."""

    def make(weight_bits, act_bits) -> tuple[nn.Module, Plan]:
        model = tiny_net()
        plan = quantize(model, pictures[:1], weight_bits, act_bits)
        for layer in quantized_layers(model).values():
            if layer.norm is not None:  # conversion leaves none negative, but training may
                layer.norm.weight.data[2:5] *= -1
        calibrate(model, [pictures])
        return model, plan

    return make


@pytest.fixture(scope="session")
def exported(
    tiny_net, tiny_quantized, tiny_preprocessing, tmp_path_factory
) -> Callable[..., Export]:
    """Exports the small network at the given widths, once a session for each."""
    folder = tmp_path_factory.mktemp("exports")

    @lru_cache
    def export(weight_bits, act_bits) -> Export:
        path = folder / f"w{weight_bits}a{act_bits}" / "model.onnx"
        path.parent.mkdir()
        if weight_bits == 32:
            plan, model = None, tiny_net()
            deployed = model
        else:
            model, plan = tiny_quantized(weight_bits, act_bits)
            deployed = deploy(model)
        export_onnx(deployed, path, tiny_preprocessing, {"recipe": {"model": "tiny"}})
        return Export(plan, model, deployed, path, inspect_onnx(path))

    return export


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session, the same in each of its processes."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def run_once(shared_folder: Path) -> Iterator[Callable[..., Path]]:
    """Makes the run of a command line once a session, in whichever of its processes needs it first.

    The folder is for reading only, which is checked at the end: to change something, copy it. What
    the command printed with --json is in `printed.json` beside it.
    """
    made: dict[Path, dict[str, tuple[int, int]]] = {}

    def run(name: str, *line: str | Path) -> Path:
        place = shared_folder / f"run once {name}"
        place.mkdir(exist_ok=True)
        folder, printed = place / "run", place / "printed.json"
        with FileLock(place / "lock"):
            if not printed.exists():
                answer = ricciq(*line, "--output", folder, "--json")
                assert answer.code == 0, answer.err
                printed.write_text(answer.out)
        made.setdefault(folder, contents(folder))
        return folder

    yield run
    for folder, before in made.items():
        assert contents(folder) == before, "a test has changed a run that others read"


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, but for the one that is locked while a command reads."""
    found = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.fixture(scope="session")
def digits_run(run_once: Callable[..., Path]) -> Callable[..., Path]:
    """Makes the folder of a finished run on digits with the given flags, for reading only."""

    def run(*flags: str) -> Path:
        return run_once(" ".join(flags), "quantize", "digits_resnet8", "--data", "digits", *flags)

    return run


@pytest.fixture(scope="session")
def finished_run(run_once: Callable[..., Path]) -> Path:
    """The folder of a finished run with two bits, for tests that only read one."""
    return run_once("finished", *MAIN_JOB, "--epochs", "2")
