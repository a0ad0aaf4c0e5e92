"""What a server says of itself when it has started."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from deltastore_kernels import native, ops
from deltastore_kernels.layout import Format, PageLayout
from sglang_deltastore.policy.config import Settings
from sglang_deltastore.seam import start_line
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize

PAGES = 64


def store(*formats: Format, backend: str = "reference") -> PageStore:
    layouts = tuple(PageLayout(fmt, 2, 64, 16) for fmt in formats)
    return PageStore(StoreSize(layouts, num_frames=2, context_tokens=128), PAGES, "cpu", ops.load(backend))


def test_tier_kernels_calibration_and_capacity() -> None:
    kept = store(Format(4, 2), Format(4, 2))
    line = start_line.start_line(Settings("deltastore", "k4v2"), kept, "none, because")
    assert line.startswith("tier k4v2 (K4V2); kernels reference (plain torch); calibration: none, because; ")
    resident_bytes = kept.pages_bytes + kept.frames_bytes + kept.sinks_bytes
    fp16_tokens = resident_bytes // (2 * 2 * 64 * 2 * 2)
    assert line.endswith(
        f"capacity 1,024 tokens in {resident_bytes / 1e6:,.1f} MB, where fp16 would hold {fp16_tokens}"
    )
    assert fp16_tokens < PAGES * 16


def test_what_sglang_frees_behind_windows_is_not_counted_for_us() -> None:
    kept = store(Format(4, 2), Format(4, 2))
    kept.size = replace(kept.size, stock_shares=(1.0, 0.8))
    resident_bytes = kept.pages_bytes + kept.frames_bytes + kept.sinks_bytes
    line = start_line.start_line(Settings("deltastore", "k4v2"), kept, "none")
    assert line.endswith(f"where fp16 would hold {int(resident_bytes / (1.8 * 2 * 64 * 2 * 2)):,}")


def test_pages_of_layers_with_windows_are_counted_by_themselves() -> None:
    kept = store(Format(4, 2), Format(4, 2))
    windows = replace(kept.size, window_layers=(True, False), window_share=0.25)
    parted = PageStore(windows, PAGES, "cpu", kept.ops)
    line = start_line.start_line(Settings("deltastore", "k4v2"), parted, "none")
    assert "capacity 1,024 tokens (256 in layers with windows) in " in line


def test_a_draft_model_s_own_kv_is_named() -> None:
    kept = store(Format(4, 2))
    kept.size = replace(kept.size, draft_pool_token_bytes=1000)
    line = start_line.start_line(Settings("deltastore", "k4v2"), kept, "none")
    assert line.endswith("; the draft model's own KV beside it 1.0 MB")


def test_bits_by_layer_are_counted() -> None:
    assert start_line.formats_of(store(Format(4, 2), Format(3, 3), Format(4, 2))) == "1 x K3V3, 2 x K4V2"


@pytest.mark.skipif(not native.available(), reason="no compiled kernels here: make setup builds them")
def test_compiled_kernels_say_their_instruction_set() -> None:
    line = start_line.start_line(Settings("deltastore"), store(Format(4, 3), backend="cpu"), "x")
    assert f"kernels cpu ({native.isa()});" in line


@pytest.mark.parametrize(("kernels", "warnings"), [("auto", 1), ("reference", 0)])
def test_slow_kernels_that_nobody_asked_for_are_a_warning(
    kernels: str, warnings: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO):
        start_line.log_start(Settings("deltastore", kernels=kernels), store(Format(4, 3)), "none", torch.float32)
    assert [record.levelname for record in caplog.records] == ["INFO"] + ["WARNING"] * warnings
    assert "plain torch" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    ("dtype", "flags", "warned"),
    [
        (torch.bfloat16, {"avx2"}, True),
        (torch.float32, {"avx2"}, False),
        (torch.bfloat16, {"avx2", "avx512_bf16"}, False),
    ],
)
def test_a_cpu_without_bfloat16_is_named(
    dtype: torch.dtype, flags: set[str], warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(start_line, "cpu_flags", lambda: frozenset(flags))
    with caplog.at_level(logging.WARNING):
        start_line.log_start(Settings("deltastore", kernels="cpu"), store(Format(4, 3)), "none", dtype)
    assert ("add --dtype float32" in caplog.text) == warned
