"""Packed pages on the host: the very bytes, whichever pages go and whichever take them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltastore_kernels import ops
from deltastore_kernels.layout import Format, PageLayout
from sglang_deltastore.seam.host_pool import DeltaHostPool
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize

P, PAGES = 32, 24
LAYOUTS = (PageLayout(Format(4, 3), 2, 64, P), PageLayout(Format(3, 2), 1, 32, P))


def device_pool(seed: int, layouts: tuple[PageLayout, ...] = LAYOUTS) -> Any:
    """What the host pool reads of a DeltaKVPool, around a store with random bytes in all pages."""
    store = PageStore(StoreSize(layouts, num_frames=2, context_tokens=512), PAGES, "cpu", ops.load("reference"))
    for pages in store.pages:
        pages.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(
        store=store, page_size=P, size=PAGES * P, layer_num=len(layouts), start_layer=0, end_layer=len(layouts),
        device="cpu", calibration=None, identity="one store",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def little_memory_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.mem_cache.pool_host.base.HICACHE_HOST_MEMORY_RESERVE_BYTES", 0)


def slots(pages: list[int]) -> torch.Tensor:
    return (torch.tensor(pages)[:, None] * P + torch.arange(P)).flatten()


some_pages = st.permutations(range(1, PAGES + 1)).flatmap(
    lambda order: st.integers(1, PAGES).map(lambda count: order[:count])
)


@settings(max_examples=40, deadline=None)
@given(some_pages, some_pages, some_pages)
def test_pages_come_back_as_they_were(source: list[int], host: list[int], target: list[int]) -> None:
    count = min(map(len, (source, host, target)))
    source, host, target = source[:count], host[:count], target[:count]
    pool = device_pool(seed=1)
    on_host = DeltaHostPool(pool, host_to_device_ratio=2.0, host_size_gb=0)
    before = [pages.clone() for pages in pool.store.pages]
    on_host.backup_from_device_all_layer(pool, slots(host), slots(source), "direct")
    for layer, pages in enumerate(pool.store.pages):
        pages.zero_()
        on_host.load_to_device_per_layer(pool, slots(host), slots(target), layer, "direct")
        assert torch.equal(pages[target], before[layer][source])
        others = [page for page in range(PAGES + 1) if page not in target]
        assert not pages[others].any()


@pytest.mark.parametrize("wrong", [slots([3])[1:], slots([3]).flip(0), slots([3, 4])[8:40]])
def test_what_is_no_whole_page_is_refused(wrong: torch.Tensor) -> None:
    pool = device_pool(seed=3)
    on_host = DeltaHostPool(pool, host_to_device_ratio=2.0, host_size_gb=0)
    with pytest.raises(ValueError, match="not whole pages of 32 in order"):
        on_host.backup_from_device_all_layer(pool, slots([1])[: len(wrong)], wrong, "direct")


def test_the_host_holds_as_many_tokens_more_as_pages_are_smaller() -> None:
    pool = device_pool(seed=4)
    size = pool.store.size
    on_host = DeltaHostPool(pool, host_to_device_ratio=2.0, host_size_gb=1e-3)
    assert on_host.size_per_token == -(-size.page_bytes // P)
    assert sum(rows.nbytes for rows in on_host.kv_buffer) == on_host.page_num * size.page_bytes
    raw_page_bytes = sum(layout.raw_page_bytes for layout in LAYOUTS)
    fp16_tokens = 1e6 / (raw_page_bytes / P)
    assert on_host.size / fp16_tokens == pytest.approx(raw_page_bytes / size.page_bytes, rel=0.02)


@pytest.mark.parametrize("command", ["attach_hicache_storage", "detach_hicache_storage", "update_weights_from_disk"])
def test_a_running_servers_storage_and_its_weights_stay(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    from sglang_deltastore.seam import requests, targets

    monkeypatch.setattr(requests, "settings_of", lambda _: SimpleNamespace(enabled=True))
    assert callable(getattr(TokenizerManager, command))
    assert command in targets.CONTROLS
    refuse = requests.refuse_control(command)
    with pytest.raises(requests.ControlRefused, match=f"{command} is refused: .*--hicache-storage-backend"):
        refuse(SimpleNamespace(server_args=SimpleNamespace(hicache_storage_backend="file")))
    if "weights" in command:  # without a storage they may change
        refuse(SimpleNamespace(server_args=SimpleNamespace(hicache_storage_backend=None)))
