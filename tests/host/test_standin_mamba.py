"""What the stand-in for sgl_kernel computes of gated delta net layers, against Hugging Face's own code for them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as hf

from sglang_deltastore.host.environment import STANDIN
from tests import budgets

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, SLOTS, CHANNELS, WIDTH = 2, 4, 16, 8, 6, 12, 4
#: two requests in one batch, the second over more than one chunk
LENGTHS, SLOT_OF = (5, 150), (3, 1)


@pytest.fixture(scope="module")
def mamba() -> Iterator[ModuleType]:
    held = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "sgl_kernel"}
    for name in held:
        del sys.modules[name]
    sys.path.insert(0, str(STANDIN))
    yield importlib.import_module("sgl_kernel.mamba")
    sys.path.remove(str(STANDIN))
    for name in [name for name in sys.modules if name.split(".")[0] == "sgl_kernel"]:
        del sys.modules[name]
    sys.modules.update(held)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, atol=budgets.BACKEND_DELTA_RULE, rtol=budgets.BACKEND_DELTA_RULE)


def starts() -> torch.Tensor:
    return torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)


def test_the_gated_delta_rule(mamba: ModuleType, random: torch.Generator) -> None:
    tokens = sum(LENGTHS)
    q, k = (torch.randn(1, tokens, KEY_HEADS, KEY_DIM, generator=random) for _ in range(2))
    v = torch.randn(1, tokens, VALUE_HEADS, VALUE_DIM, generator=random)
    g, beta = (
        -torch.rand(1, tokens, VALUE_HEADS, generator=random),
        torch.rand(1, tokens, VALUE_HEADS, generator=random),
    )
    states = torch.randn(SLOTS, VALUE_HEADS, VALUE_DIM, KEY_DIM, generator=random)
    before = states.clone()
    out, _, chunks = mamba.chunk_gated_delta_rule_cpu(
        q, k, v, g, beta, states, starts(), False, True, torch.tensor(SLOT_OF)
    )
    first_chunk = 0
    for row, length, slot in zip((0, LENGTHS[0]), LENGTHS, SLOT_OF, strict=True):
        rows = slice(row, row + length)
        query, key = (x[:, rows].repeat_interleave(VALUE_HEADS // KEY_HEADS, 2) for x in (q, k))
        of_request = (query, key, v[:, rows], g[:, rows], beta[:, rows])
        start = before[slot : slot + 1].transpose(2, 3)
        expected, last = hf.torch_chunk_gated_delta_rule(
            *of_request, initial_state=start.clone(), output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        assert close(out[:, rows], expected)
        assert close(states[slot], last[0].transpose(1, 2))
        for chunk, tokens_before in enumerate(range(0, length, mamba.CHUNK_TOKENS)):
            part = [x[:, :tokens_before] for x in of_request]
            _, then = hf.torch_recurrent_gated_delta_rule(*part, start.clone(), True, True)
            assert close(chunks[0, first_chunk + chunk], then[0].transpose(1, 2))
        first_chunk += chunk + 1
    untouched = [slot for slot in range(SLOTS) if slot not in SLOT_OF]
    assert torch.equal(states[untouched], before[untouched])


def test_a_decode_step_is_the_rule_with_its_gates(mamba: ModuleType, random: torch.Generator) -> None:
    q, k = (torch.randn(1, 2, KEY_HEADS, KEY_DIM, generator=random) for _ in range(2))
    v = torch.randn(1, 2, VALUE_HEADS, VALUE_DIM, generator=random)
    a, b = (torch.randn(2, VALUE_HEADS, generator=random) for _ in range(2))
    log_decay, bias = (torch.randn(VALUE_HEADS, generator=random) for _ in range(2))
    states = torch.randn(SLOTS, VALUE_HEADS, VALUE_DIM, KEY_DIM, generator=random)
    twin, where, ones = states.clone(), torch.tensor(SLOT_OF), torch.arange(3, dtype=torch.int32)
    # As SGLang finds it.
    out = torch.ops.sgl_kernel.fused_sigmoid_gating_delta_rule_update_cpu(
        log_decay, bias, q, k, v, a, b, states, where, ones, True, 1.0, 20.0
    )
    g = -log_decay.exp() * torch.nn.functional.softplus(a + bias)
    expected, _, _ = mamba.chunk_gated_delta_rule_cpu(
        q, k, v, g[None], b.sigmoid()[None], twin, ones, False, True, where
    )
    assert torch.equal(out, expected)
    assert torch.equal(states, twin)


def test_the_convolution_in_one_go_in_parts_and_token_by_token(mamba: ModuleType, random: torch.Generator) -> None:
    x = torch.randn(CHANNELS, sum(LENGTHS), generator=random)
    weights, bias = torch.randn(CHANNELS, WIDTH, generator=random), torch.randn(CHANNELS, generator=random)
    where, fresh = torch.tensor(SLOT_OF), torch.zeros(2, dtype=torch.bool)
    states = torch.full((SLOTS, CHANNELS, WIDTH - 1), 7.0)  # of an earlier request: must not be seen
    whole = mamba.causal_conv1d_fn_cpu(x, weights, bias, "silu", states, fresh, where, starts(), list(LENGTHS))
    for row, length in zip((0, LENGTHS[0]), LENGTHS, strict=True):
        own = x[None, :, row : row + length]
        theirs = torch.nn.functional.conv1d(own, weights[:, None], bias, padding=WIDTH - 1, groups=CHANNELS)
        assert close(whole[:, row : row + length], torch.nn.functional.silu(theirs[0, :, :length]))

    own, again = x[:, LENGTHS[0] :], torch.full_like(states, 7.0)
    slot, start = where[1:], torch.tensor([0, 2])
    parts = [mamba.causal_conv1d_fn_cpu(own[:, :2], weights, bias, "silu", again, fresh[1:], slot, start, [2])]
    start = torch.tensor([0, 100])
    parts += [mamba.causal_conv1d_fn_cpu(own[:, 2:102], weights, bias, "silu", again, ~fresh[1:], slot, start, [100])]
    for token in own[:, 102:].T:
        parts.append(mamba.causal_conv1d_update_cpu(token[None], again, weights, bias, "silu", slot).T)
    assert close(torch.cat(parts, 1), whole[:, LENGTHS[0] :])
    assert torch.equal(again[SLOT_OF[1]], own[:, 1 - WIDTH :])


def test_norms_and_gates_of_qwen3_5(mamba: ModuleType, random: torch.Generator) -> None:
    heads, dim = 3, 16
    norm = hf.Qwen3NextRMSNorm(dim, eps=1e-6)
    norm.weight.data = torch.randn(dim, generator=random)
    q_gate, k = torch.randn(5, heads * 2 * dim, generator=random), torch.randn(5, dim, generator=random)
    q, k_normed, gate = torch.ops.sgl_kernel.fused_qk_gemma_rmsnorm_with_gate_cpu(
        q_gate, k, norm.weight, norm.weight, 1e-6, dim, heads
    )
    query, own_gate = q_gate.view(5, heads, 2 * dim).chunk(2, -1)
    assert close(q.view(5, heads, dim), norm(query).detach())
    assert close(k_normed, norm(k).detach())
    assert torch.equal(gate.view(5, heads, dim), own_gate)
    x = torch.randn(5, heads * dim, generator=random)
    expected = x * own_gate.sigmoid().reshape(5, -1)
    torch.ops.sgl_kernel.fused_sigmoid_mul_cpu(x, own_gate)
    assert close(x, expected)


def test_projections_are_taken_apart(mamba: ModuleType) -> None:
    qkvz, ba = torch.arange(2.0 * 10).view(2, 10), torch.arange(2.0 * 4).view(2, 4)
    qkv, z, b, a = torch.ops.sgl_kernel.fused_qkvzba_split_reshape_cat_contiguous_cpu(qkvz, ba, 1, 2, 1, 2)
    assert qkv.tolist() == [[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15]]
    assert z.tolist() == [[[6, 7], [8, 9]], [[16, 17], [18, 19]]]
    assert (b.tolist(), a.tolist()) == ([[0, 1], [4, 5]], [[2, 3], [6, 7]])
