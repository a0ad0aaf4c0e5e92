"""A decode step by calculation (benchmarks/gpu/step.py): what it counts, and its sums."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from benchmarks.gpu import static_report, step
from benchmarks.gpu.roofline import GPUS, TOKENS_AND_HEADS
from deltastore_kernels.layout import Format
from deltastore_kernels.ops import GPU_BACKENDS
from sglang_deltastore.store import steps
from tests import budgets

LLAMA, K4V3 = step.MODELS[0], Format(4, 3)
MEMORY = GPUS[step.ARCHITECTURE].memory_bytes_per_us


@cache
def found() -> list[dict[str, Any]]:
    """Of attention that takes 0.01 us for each token and KV head of a thousand."""
    limits = {"us": TOKENS_AND_HEADS * 1e-5, "limit": "issue"}
    return list(step.rows(lambda fmt, head_dim: {"roofline": limits}, lambda fmt, head_dim: {4: 200, 16: 500}))


def of(**wanted: Any) -> dict[str, Any]:
    (row,) = (row for row in found() if all(row[name] == value for name, value in wanted.items()))
    return row


def test_every_cell_is_there_and_adds_up() -> None:
    assert len(found()) == 3 * 3 * 3 * 2
    for row in found():
        assert row["calculated"]
        layer = sum(each["us"] for each in row["layer"])
        assert row["us"] == pytest.approx(row["once_us"] + row["layers"] * layer)
        assert row["kernels_a_layer"] == len(row["layer"]) <= budgets.GPU_DECODE_KERNELS_PER_LAYER["flashinfer"]
        assert row["kernels_once"] <= budgets.GPU_DECODE_KERNELS_PER_STEP
        assert all(each["us"] >= step.SMALL_KERNEL_US for each in row["layer"])


def test_attention_follows_the_context_and_nothing_else_does() -> None:
    short, long = (of(model="Llama-3-8B", batch=32, context_tokens=c, format="K4V3") for c in (16384, 131072))
    for one, other in zip(short["layer"], long["layer"], strict=True):
        if one["kernel"] == step.ATTEND:
            assert other["us"] - one["us"] == pytest.approx(1e-5 * 32 * 8 * (131072 - 16384))
        else:
            assert one == other


def test_a_kernel_takes_what_its_bytes_take() -> None:
    """By hand: queries, keys and values [256, 32 + 8 + 8, 128] in and out, two calibrated matrices and a mean for each
    KV head; of what is stored, keys and values in and out, a sixteenth of the frames in and of a page of tiles out,
    and the shaping."""
    row = of(model="Llama-3-8B", batch=256, context_tokens=1024, format="K4V3")
    layer = {each["kernel"]: each for each in row["layer"]}
    entered = 2 * 256 * 48 * 128 * 2 + 8 * 128 * (2 * 128 + 1) * 4
    tile = 8 * (16 * 128 * (4 + 3) // 8 + 16 + 2)
    stored = 2 * 256 * 16 * 128 * 2 + 256 // 16 * (2 * 8 * 16 * 128 * 2 + tile) + 8 * 128 * 128 * 4
    assert layer["enter"]["bytes"] == entered
    assert layer["store_tokens"]["bytes"] == pytest.approx(stored, rel=1e-3)  # pages are padded
    # 16 tiles of 8 heads at once, four warps each, on 528 schedulers
    assert layer["store_tokens"]["us"] == pytest.approx(stored / MEMORY + 500 * 128 / 1755, rel=1e-3)
    assert layer["enter"]["us"] == pytest.approx(entered / MEMORY)


def test_stock_reads_its_context_and_writes_a_token() -> None:
    tokens = 32 * 16384 * 8
    attention_us = tokens * 4 * 128 / MEMORY
    assert step.stock_us(LLAMA, 32, tokens, 2) == pytest.approx(32 * (attention_us + step.SMALL_KERNEL_US))
    assert step.stock_us(LLAMA, 1, 8, 1) == 32 * 2 * step.SMALL_KERNEL_US


def test_one_more_kernel_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = step.traced(LLAMA, 4, K4V3)
    write = steps.PageStore.write
    monkeypatch.setattr(steps.PageStore, "write", lambda store, layer, key, *rest: write(store, layer, key * 2, *rest))
    after = step.traced(LLAMA, 4, K4V3)
    assert len(after.layer) == len(before.layer) + 1
    assert after.once == before.once


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_both_backends_launch_few(backend: str, calibrated: bool) -> None:
    """Whatever the batch is."""
    for batch in step.BATCHES:
        layer = step.traced(LLAMA, batch, K4V3, backend, calibrated).layer
        assert len(layer) == budgets.GPU_DECODE_KERNELS_PER_LAYER[backend], layer


def test_the_page_names_a_calculation() -> None:
    text = static_report.step_markdown(found(), {"commit": "", "date": "today"})
    assert "A calculation: nothing here was run on a GPU" in text
    assert text.count("\n| Llama-3-8B") == 18
    assert "| attend_decode |" in text
