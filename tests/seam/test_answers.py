"""Every attribute that SGLang's common code asks an attention backend or a KV pool for is answered by ours."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import sglang

from sglang_deltastore.seam.backend import DeltaAttentionBackend
from sglang_deltastore.seam.calibrating import _Observing
from sglang_deltastore.seam.kv_pool import DeltaKVPool, DeltaWindowKVPool

SOURCES = Path(sglang.__path__[0]) / "srt"

#: how SGLang's code names the two, as variables, attributes and functions
BACKEND = {"attn_backend", "get_attn_backend"}
POOL = {"token_to_kv_pool", "get_token_to_kv_pool", "get_kvcache", "kvcache", "_kvcache", "kv_pool"}

#: code of other backends and pools, and of what is refused at start
FOREIGN = (
    "layers/attention", "layers/dcp", "layers/cp", "hardware_backend", "kernel_plugins", "speculative/dflash",
    "disaggregation", "managers/hisparse_coordinator.py", "mem_cache/hybrid_cache", "mem_cache/pool_host",
    "mem_cache/storage", "mem_cache/buffer_mode", "mem_cache/allocator/hisparse.py", "mem_cache/allocator/swa.py",
    "mem_cache/allocator/unified", "mem_cache/unified_memory_pool.py", "mem_cache/unified_draft_pool.py",
    "mem_cache/deepseek_v4_memory_pool.py", "model_executor/encoder_swa_replay.py",
    "model_executor/forward_batch_deepseek_mha_mixin.py",
)  # fmt: skip
#: models whose attention layers another rule refuses: MLA and its successors, states beside attention
FOREIGN_MODELS = (
    "deepseek", "dots3", "minimax_m3", "nemotron_h", "jet_nemotron", "granitemoehybrid", "lfm2", "mamba",
    "falcon_", "zaya", "inkling", "sarvam_moe", "glm5_next", "mindspore", "moss_vl", "hunyuan_v3", "minicpm",
)  # fmt: skip

_DEEPSEEK_V4 = "behind a test for DeepSeek-V4's own pool"
_WINDOWS = "behind a test for SGLang's pool with windows"
_PREFILL_GRAPHS = "graphs of prefills, which are switched off"

#: what has no answer of ours, and why nobody asks for it
NOT_ASKED = {
    "enable_early_verify_metadata": "behind an option for DeepSeek-V4.1",
    "extend_attention_block_m": "behind a hasattr",
    "max_context_len": "a step without drafts: --speculative-adaptive",
    "update_mamba_state_after_mtp_verify": "hybrids over drafts",
    "get_cpu_graph_seq_len_fill_value": "rows padded for data parallelism, or for a graph, on a CPU",
    "init_cpu_graph_state": "graphs on a CPU: --enable-torch-compile",
    "init_forward_metadata_capture_cpu_graph": "graphs on a CPU: --enable-torch-compile",
    "init_forward_metadata_for_breakable_cuda_graph_capture": _PREFILL_GRAPHS,
    "prepare_forward_metadata_for_breakable_cuda_graph_replay": _PREFILL_GRAPHS,
    "tail_forward_metadata": "DeepSeek-V4: behind folds_encoder_swa_replay, which is False",
    "get_cpu_copy": "requests moved to the host: decode offload",
    "load_cpu_copy": "requests moved to the host: decode offload",
    "clear_c4_req_states": _DEEPSEEK_V4,
    "needs_paged_swa_allocator": _DEEPSEEK_V4,
    "request_window": _DEEPSEEK_V4,
    "_unified_kv": _DEEPSEEK_V4,
    "full_to_swa_index_mapping": _WINDOWS,
    "register_mapping": _WINDOWS,
    "swa_uses_full_indices": _WINDOWS,
    "translate_loc_from_full_to_swa": _WINDOWS,
}


def attributes_of(cls: type) -> set[str]:
    """Those of the class, and those that the __init__ of it and its bases set."""
    found = set(dir(cls))
    for base in cls.__mro__[:-1]:
        if "__init__" in vars(base):
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base.__init__)))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
    return found


def raises_not_implemented(cls: type, name: str) -> bool:
    """Whether SGLang's base class leaves it to us, and we did nothing."""
    method = inspect.getattr_static(cls, name, None)
    if not inspect.isfunction(method) or not method.__module__.startswith("sglang."):
        return False
    return "raise NotImplementedError" in inspect.getsource(method)


def name_of(node: ast.expr) -> str | None:
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)


def asked(tree: ast.Module, owners: set[str]) -> Iterator[str]:
    """x of every `owner.x`; hasattr and getattr with a default have an answer in any case."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and name_of(node.value) in owners:
            yield node.attr


def is_common(path: str) -> bool:
    return not path.startswith(FOREIGN) and not path.removeprefix("models/").startswith(FOREIGN_MODELS)


@cache
def common_code() -> dict[str, ast.Module]:
    """The files that name one of the two."""
    texts = {str(path.relative_to(SOURCES)): path.read_text() for path in SOURCES.rglob("*.py")}
    return {
        name: ast.parse(text)
        for name, text in texts.items()
        if is_common(name) and any(f"{owner}." in text or f"{owner}()." in text for owner in BACKEND | POOL)
    }


def unanswered(cls: type, owners: set[str]) -> dict[str, set[str]]:
    """Name -> files that ask for it."""
    have = attributes_of(cls)
    missing: dict[str, set[str]] = {}
    for path, tree in common_code().items():
        for name in asked(tree, owners):
            if name not in have or raises_not_implemented(cls, name):
                missing.setdefault(name, set()).add(path)
    return missing


@pytest.mark.parametrize(
    ("cls", "owners"), [(DeltaAttentionBackend, BACKEND), (DeltaKVPool, POOL), (DeltaWindowKVPool, POOL)]
)
def test_ours_answers(cls: type, owners: set[str]) -> None:
    missing = unanswered(cls, owners)
    assert {name: paths for name, paths in missing.items() if name not in NOT_ASKED} == {}


def test_a_pool_with_windows_answers_what_is_asked_of_one() -> None:
    missing = unanswered(DeltaWindowKVPool, POOL)
    assert [name for name in missing if NOT_ASKED[name] == _WINDOWS] == []


def test_what_a_model_asks_while_a_server_calibrates_is_answered() -> None:
    """Models alone ask then, by themselves or through forward_context: there is no runner of steps yet."""
    askers = ("models/", "model_executor/forward_context.py")
    missing = unanswered(_Observing, BACKEND)
    assert {name for name, paths in missing.items() if any(path.startswith(askers) for path in paths)} == set()


def test_nothing_is_listed_that_has_an_answer() -> None:
    missing = unanswered(DeltaAttentionBackend, BACKEND).keys() | unanswered(DeltaKVPool, POOL).keys()
    assert set(NOT_ASKED) - missing == set()
