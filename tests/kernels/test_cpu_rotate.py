"""The compiled rotate on every instruction set of this machine, against its twin."""

from __future__ import annotations

import pytest
import torch

from tests import budgets
from tests.kernels.attention_case import OPS, gaussian
from tests.kernels.cpu_case import CPU, fresh_memory_is_nan, isa
from tests.kernels.head_dims import HEAD_DIMS

assert fresh_memory_is_nan, isa  # fixtures

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_equals_the_twin(x: torch.Tensor) -> None:
    got, want = CPU.rotate(x), OPS.rotate(x)
    assert (got.dtype, got.shape) == (x.dtype, x.shape)
    assert got.is_contiguous()
    # A sum near the middle between two halves may be rounded to the other one.
    rounding = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0.0
    torch.testing.assert_close(got.float(), want.float(), rtol=rounding, atol=budgets.BACKEND_ROTATE)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("shape", [(1, 1), (17, 3), (0, 2), (97,), (2, 3, 5), (1025, 8)], ids=str)
def test_equals_the_twin(shape: tuple[int, ...], head_dim: int, dtype: torch.dtype, isa: str) -> None:
    assert_equals_the_twin(gaussian(*shape, head_dim, seed=1).to(dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_may_lie_apart(dtype: torch.dtype, isa: str) -> None:
    fused = gaussian(19, 5 * 64, seed=2).to(dtype)  # query, key, value of one projection
    assert_equals_the_twin(fused[:, 64:256].unflatten(1, (3, 64)))
    assert_equals_the_twin(fused.view(19, 5, 64).transpose(0, 1))
    assert_equals_the_twin(fused.view(19, 64, 5).transpose(1, 2))  # no two numbers of a row side by side


def test_is_its_own_inverse(isa: str) -> None:
    x = gaussian(33, 2, 128, seed=3)
    torch.testing.assert_close(CPU.rotate(CPU.rotate(x)), x, rtol=0, atol=budgets.BACKEND_ROTATE)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_halves_are_rounded_to_nearest(dtype: torch.dtype, isa: str) -> None:
    """An impulse of any size comes out as the same number 64 times: every rounding case there is."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    impulses = torch.zeros(len(every), 1, 32, dtype=dtype)
    impulses[:, 0, 0] = every
    got = CPU.rotate(impulses)[:, 0, 0]
    want = (every.float() * torch.tensor(32.0).rsqrt()).to(dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_threads_change_nothing(isa: str) -> None:
    x = gaussian(1200, 3, 64, seed=4)
    one = CPU.rotate(x)
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(CPU.rotate(x), one)
    finally:
        torch.set_num_threads(1)
