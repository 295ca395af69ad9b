"""Few rows times a large weight, computed transposed: the product itself, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prefopt.models.products import FEW_ROWS, few_rows, linear


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (FEW_ROWS, 8), (2, 3, 8), (FEW_ROWS + 1, 8)])
def test_equals_the_plain_product(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*shape, generator=generator), torch.randn(5, 8, generator=generator)
    offset = torch.randn(5, generator=generator) if bias else None
    with torch.no_grad():
        got = linear(x, weight, offset)
        torch.testing.assert_close(got, F.linear(x, weight, offset), atol=1e-6, rtol=1e-6)
        heads = got.view(*shape[:-1], 5, 1)  # attention splits the last dimension by view
    assert heads.shape == (*shape[:-1], 5, 1)
    # Transposed where there are few rows, as it came where there are many.
    rows = got.flatten(0, -2) if got.dim() > 2 else got
    assert (rows.stride(-1) == 1) == (rows.shape[0] > FEW_ROWS or rows.shape[0] == 1)


def test_one_thread_takes_the_plain_product(two_threads: None) -> None:
    torch.set_num_threads(1)
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    with torch.no_grad():
        assert linear(x, weight).is_contiguous()
        assert linear(x, weight).equal(F.linear(x, weight))


def test_gradients_take_the_plain_product() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(5, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: linear(x, weight), x)


def test_layers_are_themselves_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with few_rows(model):
        assert all("forward" in vars(layer) for layer in model)
    assert not any("forward" in vars(layer) for layer in model)
