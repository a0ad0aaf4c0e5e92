"""The stored basis: scores survive it, errors of shaped keys go where no query looks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deltastore_kernels import native, ops
from deltastore_kernels.basis import Basis, KeyBasis, fit_key_basis, staleness
from deltastore_kernels.layout import PACKED_BITS, RAW, Format, PageLayout
from deltastore_kernels.ops.encode import triton as encode_triton
from tests import budgets
from tests.kernels.attention_case import OPS, gaussian, key_basis
from tests.kernels.head_dims import HEAD_DIMS


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_scores_differ_by_the_same_number_for_all_tokens(head_dim: int, calibrated: bool) -> None:
    basis = Basis(OPS, key_basis(2, head_dim, seed=1) if calibrated else None)
    query, key = gaussian(5, 6, head_dim, seed=2), gaussian(9, 2, head_dim, seed=3)

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """[T, Hq, D], [N, H, D] -> [Hq, T, N]."""
        return torch.einsum("thd,nhd->htn", q.double(), k.repeat_interleave(3, dim=1).double())

    difference = scores(basis.rotate_query(query), basis.rotate_key(key)) - scores(query, key)
    spread = scores(query, key).std()
    assert float(difference.std(-1).max()) <= budgets.BACKEND_BASIS * spread
    assert calibrated == bool(difference.abs().max() > 0.1), "a calibrated mean has to be gone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("calibrated", [False, True])
def test_restoring_undoes_rotating(dtype: torch.dtype, calibrated: bool) -> None:
    basis = Basis(OPS, key_basis(2, 64, seed=1) if calibrated else None)
    x = gaussian(7, 2, 64, seed=4).to(dtype)
    tolerance = budgets.BACKEND_BASIS if dtype == torch.float32 else 3 * 2**-8 * float(x.abs().max())
    for restored in (basis.restore_key(basis.rotate_key(x)), basis.restore_value(basis.rotate_value(x))):
        assert restored.dtype == dtype
        torch.testing.assert_close(restored, x, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("key_dim", "value_dim", "head_dim"), [(80, 80, 96), (112, 112, 128), (192, 128, 192)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_heads_may_be_stored_in_more_dims_than_they_have(
    key_dim: int, value_dim: int, head_dim: int, calibrated: bool
) -> None:
    layout = PageLayout(RAW, 2, head_dim, 16, key_dim, value_dim)
    basis = Basis(OPS, key_basis(2, key_dim, seed=1) if calibrated else None, layout)
    query, key, value = (
        gaussian(5, 6, key_dim, seed=2),
        gaussian(9, 2, key_dim, seed=3),
        gaussian(9, 2, value_dim, seed=4),
    )
    query_rot, key_rot, value_rot = basis.rotate_query(query), basis.rotate_key(key), basis.rotate_value(value)
    assert {x.shape[-1] for x in (query_rot, key_rot, value_rot)} == {head_dim}
    scores = torch.einsum("thd,nhd->htn", query, key.repeat_interleave(3, dim=1))
    stored = torch.einsum("thd,nhd->htn", query_rot, key_rot.repeat_interleave(3, dim=1))
    missing = basis.missing_score(query_rot)
    torch.testing.assert_close(stored + (missing.T[..., None] if calibrated else 0), scores, atol=1e-3, rtol=0)
    torch.testing.assert_close(basis.restore_key(key_rot), key, atol=budgets.BACKEND_BASIS, rtol=0)
    torch.testing.assert_close(basis.restore_value(value_rot), value, atol=budgets.BACKEND_ROTATE, rtol=0)


def test_zeros_lie_in_every_block_of_the_rotation() -> None:
    """Else one block's dims would be larger than another's, and a token has one scale for all."""
    value_rot = Basis(OPS, None, PageLayout(RAW, 1, 96, 16, 80, 80)).rotate_value(gaussian(4096, 1, 80, seed=1))
    first, second = value_rot[..., :64].square().mean(), value_rot[..., 64:].square().mean()
    assert 0.95 < first / second < 1.05


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_zeros_between_cost_no_quality(bits: int) -> None:
    """What rounding adds to them is no part of a key: 80 dims in 96 lose less than 96 in 96, shaped or not."""
    key, queries = gaussian(512, 2, 80, seed=5), gaussian(2, 1000, 80, seed=6)
    one = torch.eye(80).expand(2, -1, -1)
    for basis in (None, fit_key_basis(torch.zeros(2, 80), one, one)):
        narrow = query_error(key, queries, basis, bits, PageLayout(Format(bits, 4), 2, 96, 16, 80, 80))
        wide = query_error(gaussian(512, 2, 96, seed=5), gaussian(2, 1000, 96, seed=6), None, bits)
        assert narrow / 80 < wide / 96


def query_error(
    key: torch.Tensor, queries: torch.Tensor, basis: KeyBasis | None, bits: int, layout: PageLayout | None = None
) -> float:
    """Mean squared error of the scores of queries [H, N, D] with keys [T, H, D] after encoding."""
    layout = layout or PageLayout(Format(bits, 4), key.shape[1], key.shape[2], 16)
    within = Basis(OPS, basis, layout)
    tiles = within.rotate_key(key).unflatten(0, (-1, 16)).transpose(1, 2)
    pages = torch.zeros(len(tiles), layout.page_bytes, dtype=torch.uint8)
    at = torch.arange(len(tiles))
    OPS.encode(tiles, tiles, at, torch.zeros_like(at), pages, layout, within.key_shaping)
    decoded = OPS.decode(pages, at, layout)[0].transpose(1, 2).flatten(0, 1)
    error = within.restore_key(decoded) - key
    return float((queries @ error.permute(1, 2, 0)).square().mean())


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize(("head_dim", "stored"), [(64, 64), (80, 96)])
def test_shaping_lowers_the_error_that_queries_see(head_dim: int, stored: int, bits: int) -> None:
    """Queries near a plane: most directions are free to take the error."""
    heads, tokens = 2, 512
    layout = PageLayout(Format(bits, 4), heads, stored, 16, head_dim, head_dim)
    key = gaussian(tokens, heads, head_dim, seed=5)
    queries = gaussian(heads, 1000, head_dim, seed=6) * torch.tensor([4.0] * 4 + [0.25] * (head_dim - 4))
    centered = key - key.mean(0)
    covariance = torch.einsum("thd,the->hde", centered, centered) / tokens
    fitted = fit_key_basis(key.mean(0), covariance, queries.mT @ queries / 1000)
    plain, shaped = (query_error(key, queries, basis, bits, layout) for basis in (None, fitted))
    assert shaped < budgets.FORMAT_SHAPED_GAIN[bits] * plain


def test_staleness_foretells_what_queries_see_of_another_s_basis() -> None:
    """Keys encoded for one kind of queries, and read by another."""
    heads, head_dim, tokens = 2, 64, 512
    key = gaussian(tokens, heads, head_dim, seed=5)
    stretch = torch.tensor([4.0] * 16 + [0.5] * 48)
    own, others = (gaussian(heads, 4000, head_dim, seed=seed) * s for seed, s in ((6, stretch), (7, stretch.flip(0))))
    moments = [queries.mT @ queries / 4000 for queries in (own, others)]
    old, new = (fit_key_basis(torch.zeros(heads, head_dim), _covariance(key), moment) for moment in moments)
    torch.testing.assert_close(staleness(old, moments[0]), torch.ones(heads).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(staleness(old, 9 * moments[1]), staleness(old, moments[1]))
    foretold = float(staleness(old, moments[1]).mean())
    found = query_error(key, others, old, 4) / query_error(key, others, new, 4)
    assert foretold > 1.5
    assert abs(found / foretold - 1) < budgets.FORMAT_STALENESS


def _covariance(key: torch.Tensor) -> torch.Tensor:
    return torch.einsum("thd,the->hde", key, key) / len(key)


def test_a_fit_survives_degenerate_heads() -> None:
    """A head whose keys or queries are all zero, or lie on a line, still gives finite, invertible matrices."""
    zero, line = torch.zeros(1, 32, 32), torch.zeros(1, 32, 32)
    line[0, 0, 0] = 3.0
    for covariance in (zero, line):
        for moment in (zero, line):
            basis = Basis(OPS, fit_key_basis(torch.zeros(1, 32), covariance, moment))
            x = gaussian(3, 1, 32, seed=1)
            torch.testing.assert_close(basis.restore_key(basis.rotate_key(x)), x, atol=1e-3, rtol=1e-3)


class Copies(TorchDispatchMode):
    """Names of the operations that write a tensor anew."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.split(".")[0] in ("clone", "copy_", "_to_copy", "contiguous"):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_gpu_s_encode_gets_its_shaping_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors: the matrices are laid out once, when the basis is made."""
    given = []
    kernel = type("Kernel", (), {"__getitem__": lambda self, grid: lambda *a, **_: given.append(a[11])})()
    monkeypatch.setattr(encode_triton, "encode_tile", kernel)
    monkeypatch.setattr(encode_triton, "use_asm", lambda tensor: True)
    monkeypatch.setattr(encode_triton, "_tables", lambda bits, device: (None, None))
    layout = PageLayout(Format(4, 2), 2, 64, 16)
    with FakeTensorMode(), torch.device("cuda"):
        matrices = [torch.empty(2, 64, 64) for _ in range(3)]
        basis = Basis(OPS, KeyBasis(torch.empty(2, 64), *matrices))
        tiles, ids = torch.empty(3, 2, 16, 64), torch.empty(3, dtype=torch.int64)
        pages = torch.empty(4, layout.page_bytes, dtype=torch.uint8)
        with Copies() as copies:
            encode_triton.encode(tiles, tiles, ids, ids, pages, layout, basis.key_shaping)
    assert copies.seen == []
    assert given[0].is_contiguous()
    assert given[0].shape == (2, 64, 64)


def test_the_compiled_encode_gets_rows_whatever_the_calibration_came_in() -> None:
    fitted = key_basis(2, 64, seed=1)
    basis = Basis(OPS, replace(fitted, shaping=fitted.shaping.mT.contiguous().mT))
    assert basis.key_shaping.is_contiguous()
    assert torch.equal(basis.key_shaping, fitted.shaping)


@pytest.mark.skipif(not native.available(), reason="the compiled CPU kernels are not here")
def test_the_compiled_encode_refuses_matrices_of_another_shape() -> None:
    layout, tiles = PageLayout(Format(4, 2), 2, 64, 16), gaussian(1, 2, 16, 64, seed=1)
    cpu, pages, zero = ops.load("cpu"), torch.zeros(1, layout.page_bytes, dtype=torch.uint8), torch.tensor([0])
    right = key_basis(2, 64, seed=1).shaping
    for wrong in (right[:1], right.double(), right.mT):
        with pytest.raises(ValueError, match="key_shaping: given are shape"):
            cpu.encode(tiles, tiles, zero, zero, pages, layout, wrong)
    assert torch.all(pages == 0)
