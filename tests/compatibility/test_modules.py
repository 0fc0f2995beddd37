"""Any torch module is converted and agrees with its file, or is kept or refused in a sentence."""

import copy
from collections import namedtuple

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import update_bn
from torchvision.models import (
    MaxVit,
    get_model,
    get_model_builder,
    get_model_weights,
    list_models,
)
from zoo import enliven, fit_head, make_pictures

from ricciq import (
    Preprocessing,
    Recipe,
    calibrate,
    evaluate,
    export_onnx,
    finetune,
    open_data,
    quantize,
)
from ricciq.errors import InputError, ModelError
from ricciq.networks import logits_of
from ricciq.system.journal import Journal
from ricciq.training.reconstruction import reconstruct

pytestmark = pytest.mark.slow
CLASSES = 10
SIZE = 32
AGREEMENT = 90.0  # percent of 20 pictures: two may fall the other way in a random network
BLANK = torch.zeros(2, 3, SIZE, SIZE)
Output = namedtuple("Output", ["aux", "logits"])


class Net(nn.Module):
    """Two convolutions and two linear layers, of which parts can be replaced."""

    def __init__(self, conv=None, linear=None, middle=None):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.conv = conv or nn.Conv2d(16, 16, 3, 1, 1)
        self.middle = nn.Identity() if middle is None else middle
        self.linear = linear or nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = self.middle(F.relu(self.conv(x))).mean((2, 3))
        return self.head(F.relu(self.linear(x)))


class Returns(Net):
    """Returns more than logits."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output(super().forward(x))


class Encoder(nn.Module):
    """Patches, a `nn.TransformerEncoder`, and a head; padding hides the last patches."""

    def __init__(self, padding=0, nested=True, **options):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        layer = nn.TransformerEncoderLayer(32, 4, 64, **{"batch_first": True, **options})
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(32, CLASSES)
        self.padding = padding

    def forward(self, x):
        x, mask = self.patches(x).flatten(2).transpose(1, 2), None
        if self.padding:
            mask = (torch.arange(x.shape[1]) >= x.shape[1] - self.padding).expand(x.shape[:2])
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))


class Tokens(nn.Module):
    """Patches and any layer over a sequence, of which the last output is classified."""

    def __init__(self, layer):
        super().__init__()
        self.patches, self.layer = nn.Conv2d(3, 32, 8, 8), layer
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        attends = isinstance(self.layer, nn.MultiheadAttention)
        return self.head((self.layer(x, x, x) if attends else self.layer(x))[0][:, -1])


class Twice(Net):
    def forward(self, x):
        x = F.relu(self.conv(F.relu(self.conv(F.relu(self.stem(x))))))
        return self.head(F.relu(self.linear(F.relu(self.linear(x.mean((2, 3)))))))


class Options(Net):
    """Layers that are called in other ways than with their input alone."""

    def __init__(self):
        super().__init__(conv=nn.ConvTranspose2d(16, 16, 3, 2, 1))

    def forward(self, x):
        x = self.conv(F.relu(self.stem(x)), output_size=[32, 32]).mean((2, 3))
        return self.head(F.relu(self.linear(input=x)))


class Function(Net):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)

    def forward(self, x):
        x = F.conv2d(F.relu(self.stem(x)), self.kernel, padding=1)
        return self.head(F.relu(self.conv(F.relu(x))).mean((2, 3)))


class Sequences(Net):
    """Convolutions along one and three axes."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(16, 16, 3, groups=4, dilation=2)
        self.three = nn.Conv3d(16, 16, 1)

    def forward(self, x):
        x = F.relu(self.one(F.relu(self.stem(x)).flatten(2)))
        return self.head(self.three(x[..., None, None]).mean((2, 3, 4)))


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), True), self.bias)


class Named(nn.Linear):
    """Differs from `nn.Linear` only in how it is built, and in what it says of itself."""

    def __init__(self, width):
        super().__init__(width, width)
        self.width = width


class Reads(Net):
    """Reads what a layer says of itself."""

    def __init__(self):
        super().__init__(linear=Named(16))

    def forward(self, x):
        return super().forward(x) / self.linear.width


class Branches(Net):
    """Takes one of two paths, by what the images hold."""

    def forward(self, x):
        return super().forward(x if x.mean() < 9 else self.other(x))


class Two(Net):
    def forward(self, x, y):
        return super().forward(x + y)


class Fixed(Net):
    def forward(self, x):
        return super().forward(x) + torch.zeros(len(x), 1)


def applied(function, *names, net=None):
    """A network to some of whose layers a function was applied."""
    net = net or Net()
    for name in names:
        function(net.get_submodule(name))
    return net


def hooked(name):
    net = Net()
    net.get_submodule(name).register_forward_hook(lambda _, __, output: 2 * output)
    return net


NORM = "fold it with torch.nn.utils.parametrize.remove_parametrizations"
HOOKS = "fold it with torch.nn.utils.prune.remove"
SEES = "it has hooks"
NETS = {
    "TransformerEncoder": (Encoder, {}),
    "TransformerEncoder, norm first": (lambda: Encoder(norm_first=True, activation="gelu"), {}),
    "TransformerEncoder, padding": (lambda: Encoder(4, nested=False), {}),
    "MultiheadAttention": (
        lambda: Tokens(nn.MultiheadAttention(32, 4, batch_first=True)),
        {"layer": "MultiheadAttention has no discrete counterpart"},
    ),
    "LSTM": (
        lambda: Tokens(nn.LSTM(32, 32, batch_first=True)),
        {"layer": "LSTM has no discrete counterpart"},
    ),
    "weight_norm": (
        lambda: applied(parametrizations.weight_norm, "conv", "linear"),
        {"conv": NORM, "linear": NORM},
    ),
    "spectral_norm": (lambda: applied(parametrizations.spectral_norm, "stem"), {"stem": NORM}),
    "orthogonal": (lambda: applied(parametrizations.orthogonal, "linear"), {"linear": NORM}),
    "old weight_norm": (lambda: applied(nn.utils.weight_norm, "conv"), {"conv": HOOKS}),
    "old spectral_norm": (lambda: applied(nn.utils.spectral_norm, "linear"), {"linear": HOOKS}),
    "pruned": (
        lambda: applied(lambda m: prune.l1_unstructured(m, "weight", 0.5), "conv", "linear"),
        {"conv": HOOKS, "linear": HOOKS},
    ),
    "hooks at a layer": (lambda: hooked("conv"), {"conv": SEES}),
    "hooks at a norm": (lambda: hooked("norm"), {"norm": SEES}),
    "hooks at a block": (lambda: hooked("middle"), {}),
    "used twice": (Twice, {}),
    "called with options": (
        Options,
        {"conv": "called with more than its input", "linear": "called with more than its input"},
    ),
    "a function on a Parameter": (Function, {}),
    "one and three axes": (Sequences, {"three": "Conv3d has no discrete counterpart"}),
    "a forward of its own": (
        lambda: Net(conv=Standardized(16, 16, 3, 1, 1)),
        {"conv": "Standardized has no discrete counterpart"},
    ),
    "a subclass without a forward": (Reads, {}),
    "circular": (
        lambda: Net(conv=nn.Conv2d(16, 16, 3, 1, 1, padding_mode="circular")),
        {"conv": "circular padding has no integer kernel"},
    ),
    "in place": (
        lambda: Net(middle=nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU6(inplace=True))),
        {},
    ),
    "a dict": (lambda: Returns(lambda y: {"loss": y.sum(), "logits": y}), {}),
    "a named tuple": (lambda: Returns(lambda y: Output(y[:, :2], y)), {}),
    "a tuple of one": (lambda: Returns(lambda y: (y, None)), {}),
    "DataParallel": (lambda: nn.DataParallel(Net()), {}),
    "compiled": (lambda: torch.compile(Net(), backend="eager"), {}),
    "a compiled part": (
        lambda: Net(middle=torch.compile(nn.Conv2d(16, 16, 1), backend="eager")),
        {},
    ),
    "frozen, training": (lambda: Net().train().requires_grad_(False), {}),
}


REFUSED = {
    "scripted": (lambda: torch.jit.script(Net()), "the model is TorchScript .*that it was made"),
    "traced": (lambda: torch.jit.trace(Net().eval(), BLANK), "the model is TorchScript"),
    "a scripted part": (lambda: Net(middle=torch.jit.script(nn.ReLU())), "middle is TorchScript"),
    "exported": (
        lambda: torch.export.export(Net().eval(), (BLANK,)).module(),
        "is a program of torch.export.*give the module that was exported",
    ),
    "weights alone": (lambda: Net().state_dict(), "is a OrderedDict, not a torch.nn.Module"),
    "quantized by torch.ao": (
        lambda: torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear}),
        "linear is quantized or prepared for it by torch.ao",
    ),
    "bfloat16": (lambda: Net().bfloat16(), r"stem.weight .* is bfloat16.*give model.float\(\)"),
    "on the meta device": (lambda: Net().to("meta"), "stem.weight .* is on the meta device"),
    "two inputs": (Two, "fails on one tensor of shape .*missing 1 required positional"),
    "no layers": (nn.Flatten, "no convolution or linear layer that can be converted;"),
    "all weights computed": (
        lambda: nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(3072, 10))),
        "can be converted \\(1: a parametrization computes its weight; fold it",
    ),
    "a layer alone": (lambda: nn.Conv2d(3, CLASSES, 32), "put it into nn.Sequential"),
    "padding dropped": (lambda: Encoder(4), "build it with enable_nested_tensor=False"),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return open_data(str(make_pictures(tmp_path_factory.mktemp("pictures"))))


def preprocessing_of(size):
    return Preprocessing((3, size, size), (0.5,) * 3, (0.5,) * 3)


def batches_of(data, part, size=SIZE):
    return list(data.loader(part, preprocessing_of(size), batch_size=8, workers=0))


def learn(model, batches, most=100):
    """Learn some pictures by heart: in a deep network of chance, each last bit grows to a class."""
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(most):
        loss = F.cross_entropy(logits_of(model(images)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.03:
            break
    update_bn([images], model)
    model.eval()


def take_the_path(model, fit, val, folder):
    """Quantize, calibrate, export and compare; returns the plan."""
    size = fit[0][0].shape[-1]
    network = copy.deepcopy(model).eval()
    plan = quantize(model, fit[0][0][:2], 8, 8)
    calibrate(model, [images for images, _ in fit])
    file = export_onnx(model, folder / "m.onnx", preprocessing_of(size))
    in_file, in_torch = (
        evaluate({"float": network, "torch": model, "file": file}, val, reference=reference)
        for reference in ("torch", "float")
    )
    assert in_file["file"].agreement >= AGREEMENT
    assert in_torch["torch"].agreement >= AGREEMENT
    return plan


@pytest.mark.parametrize("name", NETS)
def test_a_module_agrees_with_its_file(name, pictures, tmp_path):
    make, kept = NETS[name]
    torch.manual_seed(0)
    model = make()
    fit = batches_of(pictures, "fit")
    with torch.compiler.set_stance("force_eager"):  # so that hooks are called
        enliven(model, fit)
        fit_head(model, fit, getattr(model, "head", None))
    plan = take_the_path(model, fit, batches_of(pictures, "val"), tmp_path)
    reasons = {part.name: part.why for part in plan.kept}
    assert {n for n, why in kept.items() if why in reasons[n]} == set(kept)
    assert plan.layers
    assert not {layer.name for layer in plan.layers} & set(kept)


FAMILIES = {
    get_model_builder(name).__module__.rpartition(".")[2]: name
    for name in sorted(
        list_models(module=torchvision.models),
        key=lambda name: -min(w.meta["num_params"] for w in get_model_weights(name)),
    )
}
"""The smallest model of each of torchvision's families, which comes last."""
OPTIONS = {
    "inception": {"init_weights": False, "aux_logits": False},
    "googlenet": {"init_weights": False},
    "vision_transformer": {"image_size": 64},
    "maxvit": {
        "input_size": (64, 64),
        "partition_size": 2,
        "stem_channels": 16,
        "block_channels": [16, 32],
        "block_layers": [1, 1],
        "head_dim": 8,
        "stochastic_depth_prob": 0.0,
    },
}
SIZES = {"inception": 96}
LARGE = {"alexnet", "convnext", "swin_transformer", "vgg", "vision_transformer"}
"""Families of which only the last layer learns; they have no BatchNorm and are less fragile."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_torchvision_agrees_with_its_file(family, pictures, tmp_path):
    torch.manual_seed(0)
    options = OPTIONS.get(family, {})
    if family == "maxvit":  # takes 224 pixels at least otherwise
        model = MaxVit(num_classes=CLASSES, **options)
    else:
        model = get_model(FAMILIES[family], num_classes=CLASSES, **options)
    fit = batches_of(pictures, "fit", SIZES.get(family, 64))
    if family in LARGE:
        fit_head(model.eval(), fit, [m for m in model.modules() if isinstance(m, nn.Linear)][-1])
    else:
        learn(model, fit)
    plan = take_the_path(model, fit, fit, tmp_path)
    weighted = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    listed = {layer.name for layer in plan.layers} | {part.name for part in plan.kept}
    assert plan.layers
    assert weighted <= listed


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantized_is_refused_in_a_sentence(name):
    make, sentence = REFUSED[name]
    with pytest.raises(ModelError, match=sentence) as refused:
        quantize(make(), BLANK, 8, 8)
    assert "\n" not in str(refused.value)


def test_layers_of_a_transformer_are_not_passed_over(pictures):
    """In evaluation and without gradients, PyTorch's own path reads their weights instead."""
    torch.manual_seed(0)
    model, images = Encoder(), batches_of(pictures, "fit")[0][0]
    quantize(model, images[:2], 2, 2)
    calibrate(model, [images])
    model.eval()
    with torch.no_grad():
        alone = model(images)
        model.encoder.layers[0].register_forward_hook(lambda *_: None)  # hooks switch it off
        assert torch.equal(model(images), alone)
    assert torch.allclose(model(images), alone, atol=1e-5)  # and so do gradients


def test_images_that_take_another_path_do_not_calibrate():
    model = Branches()
    model.other = nn.Conv2d(3, 3, 1)
    quantize(model, 10 + BLANK, 8, 8)
    with pytest.raises(InputError, match=r"no calibration image reaches other\.input_quantizer"):
        calibrate(model, [BLANK])


def test_a_fixed_batch_is_refused(tmp_path):
    with pytest.raises(ModelError, match="takes the number of images for a constant in Fixed"):
        export_onnx(Fixed(), tmp_path / "m.onnx", preprocessing_of(SIZE))
    export_onnx(Fixed(), tmp_path / "m.onnx", preprocessing_of(SIZE), batch=2)


def test_outputs_without_logits_are_refused(pictures, tmp_path):
    model = Returns(lambda y: (y, y))
    fit = pictures.loader("fit", preprocessing_of(SIZE), training=True, workers=0)
    sentence = "returns a tuple of 2 tensors without one named logits"
    with pytest.raises(ModelError, match=sentence):
        export_onnx(model, tmp_path / "m.onnx", preprocessing_of(SIZE))
    with pytest.raises(ModelError, match=sentence):
        evaluate({"model": model}, batches_of(pictures, "val"))
    with pytest.raises(ModelError, match=sentence):
        finetune(model, fit, [], Recipe())


@pytest.mark.parametrize("name", ["a dict", "compiled", "pruned", "orthogonal"])
def test_a_module_is_trained_with_a_teacher(name, pictures, tmp_path):
    torch.manual_seed(0)
    model, teacher = NETS[name][0](), NETS[name][0]()
    images = [images for images, _ in batches_of(pictures, "fit")]
    quantize(model, images[0], 2, 2)
    reconstruct(model, images, 2, Journal())
    fit = pictures.loader("fit", preprocessing_of(SIZE), training=True, batch_size=8, workers=0)
    val = batches_of(pictures, "val")
    recipe = Recipe().override({"training.epochs": 1, "training.ema": 0.5, "training.lr": 1e-3})
    assert finetune(model, fit, val, recipe, teacher=teacher).epoch == 1
    model.train()(images[0])  # weights that hooks compute are no leaves after it
    file = export_onnx(model, tmp_path / "m.onnx", preprocessing_of(SIZE))
    assert evaluate({"model": model, "file": file}, val)["file"].agreement >= AGREEMENT


@pytest.mark.parametrize("name", ["scripted", "exported", "bfloat16"])
def test_what_cannot_be_quantized_can_be_evaluated(name, pictures):
    torch.manual_seed(0)
    net = Net().eval()
    val = batches_of(pictures, "val")[:1]
    other = {
        "scripted": lambda: torch.jit.script(net),
        "exported": lambda: torch.export.export(net, (val[0][0],)).module(),
        "bfloat16": lambda: copy.deepcopy(net).bfloat16(),
    }[name]()
    assert evaluate({"net": net, "other": other}, val)["other"].max_abs_diff < 0.01


def test_export_leaves_a_model_as_it_was(tmp_path):
    model = applied(parametrizations.orthogonal, "linear").train()
    weights = copy.deepcopy(model.state_dict())
    export_onnx(model, tmp_path / "m.onnx", preprocessing_of(SIZE))
    assert model.training
    assert torch.equal(model.linear.weight, model.linear.weight)
    torch.testing.assert_close(model.state_dict(), weights)
