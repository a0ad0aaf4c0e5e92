"""What SGLang calls on a GPU server, on a GPU that is not there: the pool, and the backend's steps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVCache
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.models import utils as model_utils
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from deltastore_kernels.basis import fit_key_basis
from sglang_deltastore.observe.drift import PAUSE_SECONDS, QUERIES_PER_DIM, Drift
from sglang_deltastore.observe.guard import GUARD
from sglang_deltastore.policy.config import Settings
from sglang_deltastore.policy.moments import Moments
from sglang_deltastore.seam import calibrating, deployment, flags, host_pool
from sglang_deltastore.seam.backend import DeltaAttentionBackend
from sglang_deltastore.seam.kv_pool import build_pool
from sglang_deltastore.store.host_sinks import HostSinks
from tests import budgets
from tests.net.gpu_store import pretended_ops
from tests.net.pretend_gpu import DeviceTensor, Watch, pretend_gpu

LAYERS, QUERY_HEADS, HEADS, PAGE_TOKENS, TOKENS, REQUESTS, CONTEXT_TOKENS = 2, 4, 2, 16, 1024, 3, 256
WINDOW = 31
DIMS = ((64, 64), (80, 48))
"""Of each layer's keys and values; the second layer's are stored in 128."""


class Runner(NamedTuple):
    """As much of SGLang's model runner as the backend takes."""

    token_to_kv_pool: KVCache
    req_to_token_pool: SimpleNamespace


class Gpu(NamedTuple):
    backend: DeltaAttentionBackend
    layers: list[RadixAttention]
    watch: Watch


@pytest.fixture(params=[(range(LAYERS), ()), ((3, 7), ()), (range(LAYERS), (1,))], ids=["plain", "hybrid", "windows"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    """Of a model with attention in every layer, of one that has other layers between, and of one that has a window in
    its second layer, behind which SGLang frees pages."""
    ids, windows = list(request.param[0]), list(request.param[1])
    layers = [
        RadixAttention(
            QUERY_HEADS, key_dim, key_dim**-0.5, HEADS, layer_id=index, v_head_dim=value_dim,
            sliding_window_size=WINDOW if index in windows else -1,
        )
        for index, (key_dim, value_dim) in zip(ids, DIMS, strict=True)
    ]  # fmt: skip
    server_args = SimpleNamespace(
        model_path=str(tmp_path),
        revision=None,
        download_dir=None,
        json_model_override_args="{}",
        hicache_storage_backend=None,
    )
    flags.attach(server_args, Settings(mode="deltastore", tier_name="k4v2", calibration="none"))
    with pretend_gpu() as watch:
        monkeypatch.setattr(deployment, "choose_kernels", lambda *_args: pretended_ops(watch))
        monkeypatch.setattr(deployment, "_window_share", lambda: 1.0)
        kvc = SimpleNamespace(
            model=torch.nn.ModuleList(layers), server_args=server_args, pool_page_size=PAGE_TOKENS, device="cuda",
            kv_cache_dtype=torch.bfloat16,
            model_config=SimpleNamespace(
                context_len=CONTEXT_TOKENS, hf_text_config=None,
                hf_config=SimpleNamespace(architectures=["GptOssForCausalLM" if windows else "LlamaForCausalLM"]),
            ),
            layer_info=SimpleNamespace(start_layer=0, end_layer=ids[-1] + 1, swa_attention_layer_ids=windows),
            is_hybrid_swa=bool(windows), sliding_window_size=WINDOW,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            is_draft_worker=False,
            mambaish_config=None if len(ids) > ids[-1] else SimpleNamespace(full_attention_layer_ids=ids),
        )  # fmt: skip
        sizes, requests = SimpleNamespace(max_total_num_tokens=TOKENS), SimpleNamespace(size=REQUESTS, mamba_pool=None)
        pool = build_pool(None, kvc, sizes=sizes, req_to_token_pool=requests)
        if windows:
            pool.register_mapping(DeviceTensor(torch.arange(TOKENS + PAGE_TOKENS)))
        slots = (16 + torch.arange(REQUESTS * CONTEXT_TOKENS, dtype=torch.int32)).view(REQUESTS, CONTEXT_TOKENS)
        table = torch.cat((torch.zeros(1, CONTEXT_TOKENS, dtype=torch.int32), slots))
        rows = SimpleNamespace(req_to_token=DeviceTensor(table))
        yield Gpu(DeltaAttentionBackend(Runner(pool, rows)), layers, watch)


def sides_of(layer: RadixAttention, tokens: int) -> list[torch.Tensor]:
    """Queries, keys and values as a model's projections give them."""
    widths = (QUERY_HEADS * layer.qk_head_dim, HEADS * layer.qk_head_dim, HEADS * layer.v_head_dim)
    return [torch.randn(tokens, width, dtype=torch.bfloat16) for width in widths]


def step(gpu: Gpu, mode: ForwardMode, prefix: list[int], new: list[int]) -> None:
    """A whole forward as SGLang runs it: metadata, then every layer."""
    total = torch.tensor(prefix) + torch.tensor(new)
    batch: Any = SimpleNamespace(
        forward_mode=mode, seq_lens=DeviceTensor(total), seq_lens_cpu=total.clone(),
        extend_seq_lens_cpu=new, extend_prefix_lens_cpu=prefix,
        req_pool_indices=DeviceTensor(1 + torch.arange(len(new))), req_pool_indices_cpu=1 + torch.arange(len(new)),
    )  # fmt: skip
    gpu.backend.pool.store.sink_table.hold({1: 7, 2: 8, 3: 7})
    gpu.backend.init_forward_metadata(batch)
    tokens = sum(new)
    for layer in gpu.layers:
        q, k, v = (DeviceTensor(side) for side in sides_of(layer, tokens))
        sinks = DeviceTensor(torch.linspace(-1, 4, QUERY_HEADS).bfloat16())
        out = gpu.backend.forward(q, k, v, layer, batch, sinks=sinks)
        assert out.shape == (tokens, QUERY_HEADS * layer.v_head_dim)
        assert out.numbers.isfinite().all()


def test_a_server_s_steps_wait_for_nothing(gpu: Gpu) -> None:
    gpu.watch.waits.clear()
    step(gpu, ForwardMode.EXTEND, [0, 0, 0], [40, 7, 100])
    assert len(gpu.watch.waits) <= budgets.GPU_WAITS_PER_EXTEND_STEP, gpu.watch.waits
    step(gpu, ForwardMode.EXTEND, [40, 7, 100], [60, 1, 28])
    step(gpu, ForwardMode.MIXED, [100, 8, 128], [1, 20, 1])
    gpu.watch.waits.clear()
    for generated in range(20):
        step(gpu, ForwardMode.DECODE, [101 + generated, 28 + generated, 129 + generated], [1, 1, 1])
    assert len(gpu.watch.waits) <= 20 * budgets.GPU_WAITS_PER_DECODE_STEP, gpu.watch.waits


def test_queries_are_sampled_without_a_wait_and_for_a_few_kernels(gpu: Gpu) -> None:
    """Of random queries, which a calibration for random queries fits."""
    pool, errors = gpu.backend.pool, GUARD.errors

    def launches() -> int:
        gpu.watch.waits.clear()
        before = gpu.watch.launched
        step(gpu, ForwardMode.EXTEND, [0, 0, 0], [40, 7, 100])
        assert gpu.watch.waits == []
        return gpu.watch.launched - before

    unobserved = launches()
    ones = [torch.eye(key_dim).expand(HEADS, -1, -1) for key_dim, _ in DIMS]
    bases = [fit_key_basis(torch.zeros(one.shape[:2]), one, one) for one in ones]
    pool.drift = Drift(bases, clock=count(step=PAUSE_SECONDS).__next__)
    for _ in range(100):
        assert launches() <= unobserved + budgets.GPU_DRIFT_KERNELS_PER_EXTEND_STEP
        if pool.drift.mean:
            break
    assert GUARD.errors == errors, "an observation failed: see the log"
    assert 1 <= pool.drift.mean < 1 + 1 / QUERIES_PER_DIM


@pytest.mark.parametrize("gpu", [(range(LAYERS), ())], ids=["plain"], indirect=True)
def test_pages_and_sinks_go_to_host_memory_and_back_without_a_wait(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = gpu.backend.pool
    step(gpu, ForwardMode.EXTEND, [0, 0, 0], [40, 7, 100])
    monkeypatch.setattr(
        host_pool, "ALLOC_MEMORY_FUNCS",
        {"cuda": lambda dims, dtype, pin_memory, **_: torch.empty(dims, dtype=dtype, pin_memory=pin_memory)},
    )  # fmt: skip
    host = host_pool.DeltaHostPool(pool, host_to_device_ratio=1.0, host_size_gb=0)
    pool.store.sink_table.second_level = HostSinks(pool.store, capacity=2)
    kept = [rows.numbers.clone() for rows in pool.store.pages]
    sink = pool.store.sink_table.of_frame(1)
    kept_sink = [keys.numbers[sink].clone() for keys in pool.store.sink_key_rot]
    pages, on_host = torch.tensor([1, 2, 5]), torch.tensor([4, 3, 7])
    slots, host_slots = ((ids[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten() for ids in (pages, on_host))
    gpu.watch.waits.clear()
    host.backup_from_device_all_layer(pool, host_slots, slots, "direct")
    pool.store.sink_table.copy(8)  # on its way to a storage
    pool.store.sink_table.release(1)
    pool.store.sink_table.release(3)
    for rows in (*pool.store.pages, *pool.store.sink_key_rot):
        rows.zero_()
    for layer in range(LAYERS):
        host.load_to_device_per_layer(pool, host_slots, slots, layer, "direct")
    pool.store.sink_table.hold({2: 7})
    assert gpu.watch.waits == []
    back = pool.store.sink_table.of_frame(2)
    for layer in range(LAYERS):
        assert torch.equal(pool.store.pages[layer].numbers[pages], kept[layer][pages])
        assert torch.equal(pool.store.sink_key_rot[layer].numbers[back], kept_sink[layer])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_models_do_not_write_keys_and_values_themselves(
    gpu: Gpu, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA, Qwen3-MoE and its kin write into the buffers of a pool that calls itself bfloat16; ours has none."""
    monkeypatch.setattr(model_utils, "_is_cuda", True)
    pool = gpu.backend.token_to_kv_pool
    assert pool.dtype == gpu.backend.pool.store_dtype == torch.uint8
    monkeypatch.setattr(pool, "dtype", dtype)
    with forward_context(ForwardContext(attn_backend=gpu.backend)):
        fused = model_utils.enable_fused_set_kv_buffer(SimpleNamespace(attn_cp_metadata=None, dcp_kv_mask=None))
    assert fused == (dtype == torch.bfloat16)


def observed(layers: list[RadixAttention], qkv: list[list[torch.Tensor]]) -> tuple[list[Moments], list[torch.Tensor]]:
    """What a prompt's attention leaves behind while a server calibrates: moments on the host, and the answers."""
    backend, batch = calibrating._Observing(layers), SimpleNamespace(forward_mode=ForwardMode.EXTEND)
    out = [backend.forward(*sides, layer, batch) for layer, sides in zip(layers, qkv, strict=True)]
    return [backend.moments[layer.layer_id].to("cpu") for layer in layers], out


def test_calibrating_runs_on_the_device_and_lets_no_model_write_itself(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = [sides_of(layer, 90) for layer in gpu.layers]
    ours, out = observed(gpu.layers, [[DeviceTensor(side) for side in sides] for sides in qkv])
    wanted, out_wanted = observed(gpu.layers, qkv)
    for moments, theirs in zip(ours, wanted, strict=True):
        for name in ("mean", "rotation", "query_rotation", "shaping"):
            got, want = (getattr(each.fit().basis, name) for each in (moments, theirs))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for got, want in zip(out, out_wanted, strict=True):
        torch.testing.assert_close(got.numbers.float(), want.float(), rtol=2**-6, atol=2**-6)
    monkeypatch.setattr(model_utils, "_is_cuda", True)
    with forward_context(ForwardContext(attn_backend=calibrating._Observing(gpu.layers))):
        assert not model_utils.enable_fused_set_kv_buffer(SimpleNamespace(attn_cp_metadata=None, dcp_kv_mask=None))
