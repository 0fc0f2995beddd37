"""Files that cannot be used, what evaluation counts, and fair turns in timing."""

import json
import math

import onnx
import pytest
import torch
from torch import Tensor

from ricciq.deploy.inspection import inspect_onnx
from ricciq.deploy.latency import WARM_UP, Latency, bench_files, interleave, measure_latency
from ricciq.deploy.session import METADATA_KEY, open_session, session_metadata, session_predictor
from ricciq.errors import DataError, ModelError, UsageError
from ricciq.evaluation import evaluate, in_float32


@pytest.fixture
def file(exported):
    """A two-bit export of the small network."""
    return exported(2, 2).path


def one_sentence(error, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 500
    for word in words:
        assert word in message


# Files


@pytest.mark.parametrize("reader", [open_session, inspect_onnx])
class TestUnusableFiles:
    def test_a_missing_file(self, reader, tmp_path):
        with pytest.raises(ModelError) as error:
            reader(tmp_path / "none.onnx")
        one_sentence(error, str(tmp_path / "none.onnx"), "check the path")

    def test_a_folder(self, reader, tmp_path):
        with pytest.raises(ModelError) as error:
            reader(tmp_path)
        one_sentence(error, str(tmp_path))

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
    def test_a_truncated_file(self, reader, share, file, tmp_path):
        whole = file.read_bytes()
        path = tmp_path / "model.onnx"
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ModelError) as error:
            reader(path)
        one_sentence(error, str(path), "give an intact")

    @pytest.mark.parametrize("content", [b"This is no model.\n\nReally.", b"\x00" * 500])
    def test_other_bytes(self, reader, content, tmp_path):
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        with pytest.raises(ModelError) as error:
            reader(path)
        one_sentence(error, str(path), "give an intact")


@pytest.mark.parametrize(
    "stored", [None, "", "not JSON", "[1]", '"preprocessing"', "{}", '{"recipe": {}}']
)
def test_a_file_without_our_metadata_is_refused(file, tmp_path, stored):
    model = onnx.load(file)
    del model.metadata_props[:]
    if stored is not None:
        model.metadata_props.add(key=METADATA_KEY, value=stored)
    path = tmp_path / "foreign.onnx"
    onnx.save(model, path)
    session = open_session(path)
    with pytest.raises(ModelError) as error:
        session_metadata(session, path)
    one_sentence(error, str(path), "no ricciq metadata", "ricciq export")


def test_metadata_is_read_back(file):
    stored = session_metadata(open_session(file), file)
    assert stored["preprocessing"]["input_size"] == [3, 16, 16]
    assert json.loads(json.dumps(stored)) == stored


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 20, 16), (3, 16, 16)])
def test_pictures_of_another_shape_are_refused(file, shape):
    predict = session_predictor(open_session(file), file)
    with pytest.raises(ModelError) as error:
        predict(torch.zeros(shape))
    one_sentence(error, str(file), str(shape))


def test_threads_and_the_optimized_graph(file, tmp_path):
    saved = tmp_path / "optimized.onnx"
    session = open_session(file, threads=1, save_optimized=saved)
    assert session.get_session_options().intra_op_num_threads == 1
    assert saved.is_file()
    assert session.get_providers() == ["CPUExecutionProvider"]


# Evaluation


def table(logits: list[list[float]]):
    """A predictor that answers picture i with row i; a picture holds its own number."""
    rows = torch.tensor(logits)

    def predict(images: Tensor) -> Tensor:
        return rows[images[:, 0, 0, 0].long()]

    return predict


def batches(targets: list[int], size: int):
    images = torch.arange(len(targets)).float().view(-1, 1, 1, 1)
    return zip(images.split(size), torch.tensor(targets).split(size), strict=True)


SEVEN = [  # rows of seven logits; targets are 0, 1, 5, 4
    [5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # right
    [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0],  # second guess
    [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0],  # sixth guess
    [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0],  # fifth guess
]
TARGETS = [0, 1, 5, 4]


def cross_entropy(logits: list[float], target: int) -> float:
    return math.log(sum(math.exp(x) for x in logits)) - logits[target]


@pytest.mark.parametrize("size", [1, 3, 4])
def test_evaluation_by_hand(size):
    other = [list(row) for row in SEVEN]
    other[1] = [0.0, 7.0, 0.0, 0.0, 0.0, 0.0, 0.0]  # right, unlike the first
    other[3][6] = 0.25
    found = evaluate({"a": table(SEVEN), "b": table(other)}, batches(TARGETS, size))
    assert list(found) == ["a", "b"]
    a, b = found["a"], found["b"]
    assert (a.top1, a.top5, a.samples) == (25.0, 75.0, 4)
    assert (b.top1, b.top5, b.samples) == (50.0, 75.0, 4)
    mean = sum(cross_entropy(row, t) for row, t in zip(SEVEN, TARGETS, strict=True)) / 4
    assert a.loss == pytest.approx(mean, rel=1e-6)
    assert (a.agreement, a.max_abs_diff) == (100.0, 0.0)
    assert (b.agreement, b.max_abs_diff) == (75.0, 6.0)


def test_the_reference_can_be_chosen():
    twice = [[2 * x for x in row] for row in SEVEN]
    flipped = [row[::-1] for row in SEVEN]
    predictors = {"a": table(flipped), "b": table(SEVEN), "c": table(twice)}
    found = evaluate(predictors, batches(TARGETS, 2), reference="b")
    assert [found[name].agreement for name in "abc"] == [0.0, 100.0, 100.0]
    assert found["c"].max_abs_diff == 6.0


def test_fewer_than_five_classes_have_a_top5_of_all():
    found = evaluate({"a": table([[1.0, 0.0], [1.0, 0.0]])}, batches([0, 1], 2))
    assert (found["a"].top1, found["a"].top5) == (50.0, 100.0)


def test_a_class_the_model_does_not_know_is_refused():
    with pytest.raises(DataError) as error:
        evaluate({"a": table(SEVEN)}, batches([0, 1, 7, 2], 2))
    one_sentence(error, "class number 7", "7 classes")


@pytest.mark.parametrize("target", [-1, -100])
def test_a_negative_class_is_refused(target):
    with pytest.raises(DataError):
        evaluate({"a": table(SEVEN)}, batches([0, target], 2))


def test_no_picture_is_refused():
    with pytest.raises(DataError) as error:
        evaluate({"a": table(SEVEN)}, [])
    one_sentence(error, "no image")


def test_evaluation_takes_no_gradients():
    weight = torch.ones(1, requires_grad=True)

    def predict(images: Tensor) -> Tensor:
        logits = weight * images.flatten(1)
        assert not logits.requires_grad
        return logits

    images = torch.eye(3).view(3, 3, 1, 1)
    assert evaluate({"a": predict}, [(images, torch.arange(3))])["a"].top1 == 100.0


# Timing


def test_calls_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = interleave(calls, rounds=5)
    assert order == list("abc") * (WARM_UP + 5)
    assert list(found) == list("abc")
    assert all(len(t.rounds) == 5 for t in found.values())


def test_times_are_milliseconds_of_the_timed_rounds(monkeypatch):
    # Warming up takes 100 s a call, the timed rounds 1, 2, 3, 4 and 5 ms.
    durations = iter([100.0] * WARM_UP + [0.001, 0.002, 0.003, 0.004, 0.005])
    now = 0.0

    def call() -> None:
        nonlocal now
        now += next(durations)

    monkeypatch.setattr("ricciq.deploy.latency.time.perf_counter", lambda: now)
    found = interleave({"a": call}, rounds=5)["a"]
    assert found.rounds == pytest.approx((1.0, 2.0, 3.0, 4.0, 5.0))
    assert found.median == pytest.approx(3.0)
    assert found.quartiles == pytest.approx((2.0, 4.0))


def test_files_are_timed_on_inputs_of_their_own_shape(exported, file):
    found = measure_latency({"two": file, "float": exported(32, 32).path}, batch=3, rounds=3)
    assert list(found) == ["two", "float"]
    assert all(latency.median > 0 for latency in found.values())


def test_the_ratio_says_how_much_faster_the_file_is(exported, file, monkeypatch):
    rounds = {"file": (1.0, 2.0, 2.0), "against": (4.0, 4.0, 6.0)}
    taken = {name: Latency(times) for name, times in rounds.items()}
    monkeypatch.setattr("ricciq.deploy.latency.measure_latency", lambda *_, **__: taken)
    against = exported(32, 32).path
    found = bench_files(file, against, batch=4, threads=2)
    assert (found["file"], found["against"]) == (str(file), str(against))
    assert (found["batch"], found["threads"]) == (4, 2)
    assert (found["file_ms"], found["against_ms"], found["ratio"]) == (2.0, 4.0, 2.0)
    assert found["ratio_quartiles"] == [2.5, 3.5]  # of the rounds' own ratios: 4, 2 and 3
    assert found["against_quartiles_ms"] == [4.0, 5.0]


def test_one_file_has_no_ratio(file):
    found = bench_files(file, None, batch=1, threads=1)
    assert found.keys() == {"file", "file_ms", "file_quartiles_ms", "batch", "threads"}


def test_a_batch_no_machine_holds_is_refused(file):
    with pytest.raises(UsageError) as error:
        bench_files(file, None, batch=10**9, threads=1)
    one_sentence(error, "--batch 1000000000")


def test_a_missing_file_is_not_timed(tmp_path):
    with pytest.raises(ModelError):
        measure_latency({"a": tmp_path / "none.onnx"})


def test_a_model_that_is_no_classifier_is_refused():
    pictures = [(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.long))]
    for answer in (torch.zeros(5, 3), torch.zeros(2, 3, 4), torch.zeros(2)):
        with pytest.raises(ModelError, match="the encoder model returns an output of shape"):
            evaluate({"encoder": lambda _, answer=answer: answer}, pictures)


def test_a_file_is_evaluated_on_all_cores_and_timed_on_one(exported):
    file = exported(2, 2).path
    assert open_session(file).get_session_options().intra_op_num_threads == 0  # as many as fit
    assert open_session(file, threads=1).get_session_options().intra_op_num_threads == 1


def test_numbers_are_whole_float32_for_a_block():
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    assert before[0]  # torch's default
    with in_float32():
        assert (convolutions.allow_tf32, products.allow_tf32) == (False, False)
    assert (convolutions.allow_tf32, products.allow_tf32) == before
