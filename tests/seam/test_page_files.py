"""Stored pages: SGLang's own storage in files between two host pools, and what may befall a file."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.storage import StorageBackendFactory

from deltastore_kernels.layout import RAW, PageLayout
from sglang_deltastore.policy.refusals import Refused
from sglang_deltastore.seam import host_pool
from sglang_deltastore.seam.host_pool import DeltaHostPool
from sglang_deltastore.store.sinks import beginning_with
from tests.seam.test_host_pool import LAYOUTS, P, device_pool, little_memory_is_enough  # noqa: F401 (a fixture)

KEYS = ["a" * 64, "b" * 64, "c" * 64]
PAGES = [3, 1, 2]
FIRST_TOKEN = 123_456


def make_storage(folder: Path, host: DeltaHostPool) -> Any:
    """What a controller builds from what our strategy tells it."""
    told = host_pool._storage("file", {"file_storage_path": str(folder)})
    config = HiCacheStorageConfig(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False,
        enable_storage_metrics=False, is_page_first_layout=False, model_name=host.storage_format_tag,
        extra_config=told["storage_backend_extra_config"],
    )  # fmt: skip
    storage = StorageBackendFactory.create_backend(told["storage_backend"], config, host)
    storage.register_mem_pool_host(host)
    return storage


def make_host(identity: str = "one store", layouts: tuple[PageLayout, ...] = LAYOUTS) -> DeltaHostPool:
    """With random pages; sinks have none yet."""
    pool = device_pool(seed=1, layouts=layouts)
    pool.identity = identity
    host = DeltaHostPool(pool, host_to_device_ratio=2.0, host_size_gb=0)
    for number, rows in enumerate(host.kv_buffer):
        rows.random_(0, 256, generator=torch.Generator().manual_seed(number))
    return host


def store_pages(storage: Any, host: DeltaHostPool) -> bool:
    return storage.batch_set(KEYS, [host.get_data_page(torch.tensor(page * P)) for page in PAGES])


def load_pages(storage: Any, host: DeltaHostPool, keys: list[str] = KEYS) -> int:
    """As SGLang's controller does; how many pages came."""
    found = storage.batch_get(keys, [host.get_dummy_flat_data_page() for _ in keys])
    loaded = found.index(None) if None in found else len(found)
    for page, body in zip(PAGES[:loaded], found, strict=False):
        host.set_from_flat_data_page(torch.tensor(page * P), body)
    return loaded


@pytest.fixture
def written(tmp_path: Path) -> DeltaHostPool:
    """Three pages are stored, of which the first begins a sequence."""
    host = make_host()
    sink = torch.arange(host.sinks.sink_bytes).to(torch.uint8)
    host.sinks.put(beginning_with(FIRST_TOKEN), sink)
    host.begins(PAGES[0] * P, FIRST_TOKEN)
    assert store_pages(make_storage(tmp_path, host), host)
    assert host.storage_counts.written_pages == 3
    return host


def path_of(folder: Path, key: str) -> Path:
    return next(folder.glob(f"{key}*"))


def test_pages_come_to_another_process_as_they_were_and_bring_the_sink(tmp_path: Path, written: DeltaHostPool) -> None:
    host = make_host()
    for rows in host.kv_buffer:
        rows.zero_()
    assert load_pages(make_storage(tmp_path, host), host) == 3
    for ours, theirs in zip(host.kv_buffer, written.kv_buffer, strict=True):
        assert torch.equal(ours[PAGES], theirs[PAGES])
        assert not ours[PAGES[0] + 1].any()
    beginning = beginning_with(FIRST_TOKEN)
    assert torch.equal(host.sinks.read(beginning), written.sinks.read(beginning))
    assert (host.storage_counts.loaded_pages, host.storage_counts.refused_pages) == (3, 0)
    sizes = [path_of(tmp_path, key).stat().st_size for key in KEYS]
    assert sizes[1] == sizes[2] == sizes[0] - 8 - host.sinks.sink_bytes


def test_what_is_there_is_not_written_again(tmp_path: Path, written: DeltaHostPool) -> None:
    before = path_of(tmp_path, KEYS[1]).stat().st_mtime_ns
    assert store_pages(make_storage(tmp_path, written), written)
    assert written.storage_counts.written_pages == 3
    assert path_of(tmp_path, KEYS[1]).stat().st_mtime_ns == before


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def cut_within_the_header(path: Path) -> None:
    os.truncate(path, 40)


def turn_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def turn_a_bit_of_the_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def claim_a_sink(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40:48] = (2**62).to_bytes(8, "little")
    path.write_bytes(data)


def take_anothers_bytes(path: Path) -> None:
    path.write_bytes(path_of(path.parent, KEYS[2]).read_bytes())


@pytest.mark.parametrize(
    "harm",
    [cut, empty, cut_within_the_header, turn_a_bit, turn_a_bit_of_the_last_byte, claim_a_sink, take_anothers_bytes],
)
@pytest.mark.parametrize("harmed", [0, 1], ids=["with a sink", "without"])
def test_a_harmed_page_is_a_miss_and_is_written_anew(
    tmp_path: Path, written: DeltaHostPool, harm: Callable[[Path], None], harmed: int
) -> None:
    harm(path_of(tmp_path, KEYS[harmed]))
    host = make_host()
    storage = make_storage(tmp_path, host)
    assert load_pages(storage, host) == harmed
    assert (host.storage_counts.loaded_pages, host.storage_counts.refused_pages) == (harmed, 1)
    assert host.sinks.read(beginning_with(FIRST_TOKEN)) is None or harmed > 0
    assert not storage.exists(KEYS[harmed])
    assert store_pages(storage, host)
    assert host.storage_counts.written_pages == 1
    assert load_pages(storage, host) == 3


def test_another_store_finds_nothing(tmp_path: Path, written: DeltaHostPool) -> None:
    other = make_host("another store")
    storage = make_storage(tmp_path, other)
    assert not any(map(storage.exists, KEYS))
    assert load_pages(storage, other) == 0
    # A file that somebody has given another's name:
    os.rename(path_of(tmp_path, KEYS[0]), tmp_path / f"{storage._get_suffixed_key(KEYS[0])}.bin")
    assert storage.exists(KEYS[0])
    assert load_pages(storage, other) == 0
    assert other.storage_counts.refused_pages == 1


def test_a_store_of_floats_has_no_sinks(tmp_path: Path) -> None:
    host = make_host(layouts=(PageLayout(RAW, 2, 64, P),))
    storage = make_storage(tmp_path, host)
    host.begins(PAGES[0] * P, FIRST_TOKEN)
    assert store_pages(storage, host)
    assert load_pages(storage, host) == 3


@pytest.mark.parametrize("gone", ["removed", "a file in its place"])
def test_a_folder_that_is_gone_is_a_miss(tmp_path: Path, gone: str) -> None:
    folder, host = tmp_path / "pages", make_host()
    storage = make_storage(folder, host)
    assert store_pages(storage, host)
    folder.rename(tmp_path / "away")
    if gone != "removed":
        folder.write_text("")
    assert load_pages(storage, host) == 0
    assert not store_pages(storage, host)
    folder.unlink(missing_ok=True)
    (tmp_path / "away").rename(folder)
    assert load_pages(storage, host) == 3


def test_a_disk_that_takes_no_more_is_left_as_it_was(tmp_path: Path) -> None:
    """A limit on the size of files ends a write in its middle, as a full disk does."""
    host = make_host()
    storage = make_storage(tmp_path, host)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (host.page_bytes // 2, limits[1]))
    try:
        assert not store_pages(storage, host)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    assert load_pages(storage, host) == host.storage_counts.written_pages == 0
    assert store_pages(storage, host)
    assert load_pages(storage, host) == 3


def test_a_folder_that_cannot_be_made_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=r"file/pages cannot be made \(Not a directory\); allowed is a folder"):
        make_storage(tmp_path / "file" / "pages", make_host())
