"""The correction of activation gradients: by hand, beside other readers, and in a recipe."""

import torch
from torch import nn

from ricciq.correction import ActivationCorrection
from ricciq.estimators import METHODS
from ricciq.quantizer import ActivationQuantizer, fake_quantize


def quantizer(bits=2, scale=0.5, zero_point=0):
    made = ActivationQuantizer(bits)
    made.set_range(scale, zero_point)
    return made


class Net(nn.Module):
    """Quantizes its input for one reader and hands it as it is to another."""

    def __init__(self, beside=0.0):
        super().__init__()
        self.quantizer = quantizer()
        self.beside = beside

    def forward(self, x):
        return self.quantizer(x), self.beside * x


X = torch.tensor([[0.6, 0.9, -0.2, 9.0], [0.5, 1.0, 0.0, 1.5]])
UPSTREAM = torch.tensor([[1.0, -2.0, 5.0, 5.0], [1.0, 2.0, 3.0, 4.0]])


def gradient(net, x=X):
    x = x.clone().requires_grad_()
    quantized, beside = net(x)
    ((quantized * UPSTREAM).sum() + beside.sum()).backward()
    return x.grad


def test_what_lies_outside_is_masked_and_what_is_at_a_level_has_no_residual():
    residual, mask = quantizer().residual(X)
    expected = [[0.4, -0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(residual, torch.tensor(expected))
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


def test_codes_count_from_the_zero_point():
    residual, mask = quantizer(zero_point=1).residual(X)
    torch.testing.assert_close(residual[0], torch.tensor([0.4, -0.4, -0.8, 0.0]))
    assert mask[0].tolist() == [True, True, True, False]


def test_a_projected_gradient_by_hand():
    # The first picture's residual is (0.4, -0.4): of (1, -2) a share of (1.5, -1.5) goes.
    net = Net()
    ActivationCorrection(net, METHODS["project"])
    expected = torch.tensor([[1.0 - 1.35, -2.0 + 1.35, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    torch.testing.assert_close(gradient(net), expected)


def test_other_readers_of_the_activations_are_let_be():
    net, corrected = Net(beside=10.0), Net()
    ActivationCorrection(net, METHODS["project"])
    ActivationCorrection(corrected, METHODS["project"])
    torch.testing.assert_close(gradient(net), gradient(corrected) + 10)


def test_the_step_keeps_its_own_gradient():
    net, plain = Net(), Net()
    ActivationCorrection(net, METHODS["ricci"])
    gradient(net), gradient(plain)
    assert torch.equal(net.quantizer.log_scale.grad, plain.quantizer.log_scale.grad)


def test_progress_reaches_the_estimator():
    net = Net()
    correction = ActivationCorrection(net, METHODS["ede"])
    start = gradient(net)
    correction.progress = 1.0
    assert not torch.equal(gradient(net), start)


def test_without_gradients_nothing_is_done():
    net = Net()
    ActivationCorrection(net, METHODS["ricci"])
    quantized, _ = net(X)
    grid = net.quantizer.grid
    expected = fake_quantize(X, net.quantizer.log_scale, grid, net.quantizer.zero_point)
    assert torch.equal(quantized, expected)
