"""Blocks of rows against torch's own layers: values, gradients, dropout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from prefopt.control import perceptron
from prefopt.control.perceptron import Perceptron


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several blocks of few rows, the last one shorter."""
    monkeypatch.setattr(perceptron, "BLOCK_ROWS", 4)
    return None


def build(hidden: tuple[int, ...] = (8, 6), dropout: float = 0.0) -> Perceptron:
    torch.manual_seed(0)
    made = Perceptron(5, hidden, 3, dropout=dropout).double()
    for weight in made.parameters():  # biases that start at zero would hide a mistake
        nn.init.normal_(weight)
    return made


def rows(count: int = 10) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6)])
@pytest.mark.parametrize("count", [0, 1, 4, 10])
def test_values_and_gradients_are_those_of_torchs_layers(hidden: tuple[int, ...], count: int) -> None:
    net, given = build(hidden), rows(count)
    weights = list(net.parameters())
    direction = torch.randn(count, 3, dtype=torch.float64)
    found = net(given)
    expected = nn.Sequential.forward(net, given)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    for own, other in zip(
        torch.autograd.grad(found, weights, direction), torch.autograd.grad(expected, weights, direction), strict=True
    ):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=1e-12)


def test_an_input_with_gradient_gets_it() -> None:
    net, given = build(), rows().requires_grad_()
    assert torch.autograd.gradcheck(net, (given,))


def test_dropout_masks_and_scales_and_its_gradient_is_that_of_the_masked_network() -> None:
    net = build((64, 64), dropout=0.25).train()
    weights = list(net.parameters())

    def masked(*values: Tensor) -> Tensor:
        torch.manual_seed(7)  # the same masks whatever the weights are
        return torch.func.functional_call(net, dict(zip(dict(net.named_parameters()), values, strict=True)), (rows(3),))

    assert torch.autograd.gradcheck(masked, tuple(w.detach()[:].requires_grad_() for w in weights), fast_mode=True)


def test_dropout_keeps_the_mean_of_a_layer_and_drops_its_share() -> None:
    """A network that adds up its hidden layer: expectation as without dropout, variance p / (1 - p) sum h^2."""
    net = Perceptron(1, (400,), 1, dropout=0.25).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[-1].weight.fill_(1.0)
    ones = torch.ones(2000, 1, dtype=torch.float64)
    still = net.eval()(ones)
    noisy = net.train()(ones).detach()
    assert torch.equal(still, torch.full_like(still, 400.0))
    deviation = (400 * 0.25 / 0.75) ** 0.5
    assert abs(float(noisy.mean()) - 400) < 5 * deviation / 2000**0.5
    assert float(noisy.std()) == pytest.approx(deviation, rel=0.1)


def test_masks_follow_from_the_global_generator() -> None:
    net = build((64,), dropout=0.5).train()
    torch.manual_seed(3)
    first, second = net(rows()), net(rows())
    torch.manual_seed(3)
    assert torch.equal(net(rows()), first)
    assert not torch.equal(first, second)
    assert torch.equal(net.eval()(rows()), net(rows()))


def test_names_of_weights_are_those_of_a_sequential() -> None:
    assert [name for name, _ in build().named_parameters()] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
        "4.weight",
        "4.bias",
    ]
    assert [type(layer).__name__ for layer in build((8,), dropout=0.1)] == ["Linear", "ReLU", "Dropout", "Linear"]
