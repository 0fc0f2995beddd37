"""Recording a forward pass: calls, values and their readers, with any Python in the forward."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ricciq.convert.trace import Call, Recording, record
from ricciq.errors import ModelError

IMAGE = torch.zeros(1, 3, 8, 8)


class Model(nn.Module):
    """Some layers and a forward given as a function of the model and its input."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 1)


def call_of(recording: Recording, name: str, kind: str | None = None) -> Call:
    (found,) = [c for c in recording.calls if c.name == name and kind in (None, c.kind)]
    return found


def kinds(recording: Recording) -> list[tuple[str, str, bool]]:
    return [(c.name, c.kind, c.is_module) for c in recording.calls]


def forward_functional(m, x):
    return torch.add(m.a(x), m.b(x))


def forward_operator(m, x):
    return m.a(x) + m.b(x)


def forward_in_place(m, x):
    y, z = m.a(x), m.b(x)
    y += z
    return y


def forward_method(m, x):
    return m.a(x).add_(m.b(x))


@pytest.mark.parametrize(
    "forward", [forward_functional, forward_operator, forward_in_place, forward_method]
)
def test_an_addition_reads_what_the_modules_made(forward):
    recording = record(Model(forward, a=conv(), b=conv()), IMAGE)
    a, b, addition = recording.calls
    assert [c.name for c in (a, b, addition)] == ["a", "b", ""]
    assert (a.is_module, b.is_module, addition.is_module) == (True, True, False)
    assert "add" in addition.kind
    assert addition.inputs == (*a.outputs, *b.outputs)
    assert recording.result == addition.outputs
    assert recording.readers[a.outputs[0]] == [addition]
    assert recording.returned_by[a.outputs[0]] == ["a"]
    assert addition.outputs[0] not in (*a.outputs, *b.outputs)


def test_a_value_changed_in_place_is_another_value():
    def forward(m, x):
        y = m.a(x)
        before = m.b(y)
        y += 1
        return before + m.c(y)

    recording = record(Model(forward, a=conv(), b=conv(), c=conv()), IMAGE)
    made = call_of(recording, "a").outputs[0]
    readers = [c.name or c.kind for c in recording.readers[made]]
    assert readers[0] == "b"
    assert len(readers) == 2  # and the addition, but not c
    (read_by_c,) = call_of(recording, "c").inputs
    assert read_by_c[0] == made[0]
    assert read_by_c != made
    assert recording.readers[read_by_c] == [call_of(recording, "c")]


def test_an_inplace_relu_makes_a_new_value():
    model = nn.Sequential(conv(), nn.ReLU(inplace=True), conv())
    recording = record(model, IMAGE)
    first, relu, last = recording.calls
    assert relu.kind == "ReLU"
    assert relu.inputs == first.outputs
    assert relu.outputs != relu.inputs
    assert last.inputs == relu.outputs


def test_a_shared_module_runs_twice():
    recording = record(Model(lambda m, x: m.a(m.a(x)), a=conv()), IMAGE)
    assert recording.times["a"] == 2
    first, second = recording.calls
    assert (first.name, second.name) == ("a", "a")
    assert second.inputs == first.outputs


@pytest.mark.parametrize("idle", [nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(0.5)])
def test_a_module_that_returns_its_input_is_no_call(idle):
    recording = record(nn.Sequential(conv(), idle, conv()), IMAGE)
    first, last = recording.calls
    assert (first.name, last.name) == ("0", "2")
    assert last.inputs == first.outputs
    assert recording.times["1"] == 1
    assert recording.readers[first.outputs[0]] == [last]
    assert recording.returned_by[first.outputs[0]] == ["0", "1"]


def test_a_value_is_returned_by_the_innermost_module_first():
    block = nn.Sequential(nn.Sequential(conv(), nn.ReLU()))
    recording = record(nn.Sequential(block, conv()), IMAGE)
    relu = call_of(recording, "0.0.1")
    assert recording.returned_by[relu.outputs[0]] == ["0.0.1", "0.0", "0"]
    assert recording.returned_by[recording.result[0]] == ["1", ""]


def test_functions_carry_the_name_of_the_module_they_are_called_in():
    inner = Model(lambda m, x: F.relu(m.a(x)), a=conv())
    recording = record(Model(lambda m, x: m.inner(x).mean((2, 3)), inner=inner), IMAGE)
    assert kinds(recording) == [
        ("inner.a", "Conv2d", True),
        ("inner", "relu", False),
        ("", "mean", False),
    ]


def test_functions_in_a_module_without_children_are_not_recorded():
    whole = Model(lambda m, x: F.relu(x + 1))  # noqa: ARG005
    recording = record(Model(lambda m, x: m.whole(x), whole=whole), IMAGE)
    assert kinds(recording) == [("whole", "Model", True)]


def test_keyword_arguments_and_several_results_are_values():
    def forward(m, x):
        first, second = m.a(x).chunk(2, dim=1)
        return torch.add(input=first, other=second)

    recording = record(Model(forward, a=nn.Conv2d(3, 4, 1)), IMAGE)
    _, chunk, addition = recording.calls
    assert len(chunk.outputs) == 2
    assert addition.inputs == chunk.outputs


def test_reading_a_shape_is_no_call():
    def forward(m, x):
        y = m.a(x)
        return y.view(y.shape[0], y.size(1), -1)

    recording = record(Model(forward, a=conv()), IMAGE)
    assert [c.kind for c in recording.calls] == ["Conv2d", "view"]


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_and_statistics_are_left_as_they_were(training):
    model = nn.Sequential(conv(), nn.BatchNorm2d(3)).train(training)
    record(model, torch.ones(2, 3, 8, 8))
    assert model.training is model[1].training is training
    assert model[1].num_batches_tracked == 0


def test_a_frozen_norm_stays_frozen():
    model = nn.Sequential(conv(), nn.BatchNorm2d(3)).train()
    model[1].eval()
    record(model, IMAGE)
    assert model[0].training
    assert not model[1].training


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_removed():
    model = nn.Sequential(conv(), nn.Sequential(nn.ReLU()))
    record(model, IMAGE)
    assert hooks(model) == 0


def test_hooks_are_removed_after_a_failure():
    class Once(nn.Identity):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("a second time")
            return x

    model = nn.Sequential(conv(), Once())
    with pytest.raises(RuntimeError, match="a second time"):
        record(model, IMAGE)
    assert hooks(model) == 0
    assert torch.relu(torch.tensor(-1.0)) == 0  # and no function mode is left behind


def test_the_training_mode_is_restored_after_a_failure():
    model = nn.Sequential(conv(), nn.Linear(5, 2)).train()
    with pytest.raises(ModelError, match=r"Sequential fails on one tensor of shape \[1, 3, 8, 8\]"):
        record(model, IMAGE)
    assert model.training


class Temporaries(nn.Module):
    """Makes a bias from nothing, uses it once and forgets it."""

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def convolve(self, x):
        return torch.nn.functional.conv2d(x, self.conv.weight, torch.zeros(3))

    def forward(self, x):
        for _ in range(50):
            x = self.convolve(x)
            x = x * 2
        return x


def test_a_value_is_not_taken_for_one_that_is_gone():
    """Identities of tensors are used again once a tensor is gone."""
    recording = record(Temporaries(), IMAGE)
    made = set()
    read = set()
    for call in recording.calls:
        read |= set(call.inputs)
        assert not read & set(call.outputs)
        assert not made & set(call.outputs)
        made |= set(call.outputs)
