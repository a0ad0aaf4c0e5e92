"""A decode step by calculation (benchmarks/gpu/step.py): what it counts, and its sums."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from benchmarks.gpu import static_report, step
from benchmarks.gpu.roofline import GPUS, TOKENS_AND_HEADS
from deltastore_kernels.layout import Format
from sglang_deltastore.store import steps
from tests import budgets

LLAMA, K4V3 = step.MODELS[0], Format(4, 3)
MEMORY = GPUS[step.ARCHITECTURE].memory_bytes_per_us


@cache
def found() -> list[dict[str, Any]]:
    """Of attention that takes 0.01 us for each token and KV head of a thousand."""
    limits = {"us": TOKENS_AND_HEADS * 1e-5, "limit": "issue"}
    return list(step.rows(lambda fmt, head_dim: {"roofline": limits}))


def of(**wanted: Any) -> dict[str, Any]:
    (row,) = (row for row in found() if all(row[name] == value for name, value in wanted.items()))
    return row


def test_every_cell_is_there_and_adds_up() -> None:
    assert len(found()) == 3 * 3 * 3 * 2
    for row in found():
        assert row["calculated"]
        layer = sum(each["us"] for each in row["layer"])
        assert row["us"] == pytest.approx(row["once_us"] + row["layers"] * layer)
        assert row["kernels_a_layer"] == len(row["layer"]) <= budgets.GPU_DECODE_LAUNCHES_PER_LAYER
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
    """Tiles are gathered of all frames: read and written, [256, 8, 16, 128] float16."""
    row = of(model="Llama-3-8B", batch=256, context_tokens=1024, format="K4V3")
    gathered = max((each for each in row["layer"] if each["kernel"] == "index"), key=lambda each: each["bytes"])
    assert gathered["bytes"] == pytest.approx(2 * 256 * 8 * 16 * 128 * 2)
    assert gathered["us"] == pytest.approx(gathered["bytes"] / MEMORY)


def test_stock_reads_its_context_and_writes_a_token() -> None:
    tokens = 32 * 16384 * 8
    attention_us = tokens * 4 * 128 / MEMORY
    assert step.stock_us(LLAMA, 32, tokens, 2) == pytest.approx(32 * (attention_us + step.SMALL_KERNEL_US))
    assert step.stock_us(LLAMA, 1, 8, 1) == 32 * 2 * step.SMALL_KERNEL_US


def test_one_more_kernel_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = step.traced(LLAMA, 4, K4V3)
    rotate = steps.Basis.rotate_key
    monkeypatch.setattr(steps.Basis, "rotate_key", lambda self, key: rotate(self, key) * 2)
    after = step.traced(LLAMA, 4, K4V3)
    assert len(after.layer) == len(before.layer) + 1
    assert after.once == before.once


def test_the_page_names_a_calculation() -> None:
    text = static_report.step_markdown(found(), {"commit": "", "date": "today"})
    assert "A calculation: nothing here was run on a GPU" in text
    assert text.count("\n| Llama-3-8B") == 18
    assert "| attend_decode |" in text
