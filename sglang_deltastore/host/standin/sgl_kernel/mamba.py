"""Stand-in for `sgl_kernel.mamba`: what gated delta net layers (Qwen3-Next, Qwen3.5) compute on a CPU, in plain torch.

Slow and obvious: a token at a time. Gated delta rule: Yang et al., arXiv:2412.06464. Of a value head with decay g and
learning rate beta, over normalized q and k [K] and v [V], a state S [V, K] in float32:

    S <- exp(g) S;   S <- S + beta (v - S k) k^T;   out = S q / sqrt(K)
"""

from __future__ import annotations

import torch
from torch.nn.functional import conv1d, silu, softplus

CHUNK_TOKENS = 64
"""SGLang keeps states of a prompt at multiples of so many new tokens."""


def causal_conv1d_fn_cpu(
    mixed_qkv_transposed: torch.Tensor,
    conv_weights: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    conv_states: torch.Tensor,
    has_initial_state: torch.Tensor,
    cache_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: list[int],
) -> torch.Tensor:
    """Depthwise convolution of each request's new tokens and the width - 1 before them.

    mixed_qkv_transposed [C, T], conv_weights [C, width], conv_states [slots, C, width - 1], which is left as the last
    inputs; has_initial_state, cache_indices [B]; query_start_loc [B + 1] -> [C, T].
    """
    out = torch.empty_like(mixed_qkv_transposed)
    starts = query_start_loc.tolist()
    for request, slot in enumerate(cache_indices.tolist()):
        rows = slice(starts[request], starts[request + 1])
        before = conv_states[slot] if has_initial_state[request] else torch.zeros_like(conv_states[slot])
        inputs = torch.cat((before.to(out.dtype), mixed_qkv_transposed[:, rows]), dim=1)
        conv_states[slot] = inputs[:, inputs.shape[1] - before.shape[1] :]
        out[:, rows] = _activated(conv1d(inputs, conv_weights[:, None], bias, groups=len(inputs)), activation)
    return out


def causal_conv1d_update_cpu(
    mixed_qkv: torch.Tensor,
    conv_states: torch.Tensor,
    conv_weights: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    conv_state_indices: torch.Tensor,
) -> torch.Tensor:
    """As causal_conv1d_fn_cpu for one new token of each request: mixed_qkv [B, C] -> [B, C]."""
    inputs = torch.cat((conv_states[conv_state_indices].to(mixed_qkv.dtype), mixed_qkv[:, :, None]), dim=2)
    conv_states[conv_state_indices] = inputs[:, :, 1:].to(conv_states.dtype)
    return _activated((inputs * conv_weights).sum(2) + (0 if bias is None else bias), activation)


def chunk_gated_delta_rule_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
    initial_state_indices: torch.Tensor,
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """q, k [1, T, Hk, K], v [1, T, Hv, V], g, beta [1, T, Hv], cu_seqlens [B + 1]; initial_state [slots, Hv, V, K], of
    which initial_state_indices [B] are the requests' and are left as the last states -> out [1, T, Hv, V]; nothing;
    every request's states before each CHUNK_TOKENS of its tokens, one request after the other [1, chunks, Hv, V, K]."""
    if head_first or not use_qk_l2norm_in_kernel:
        raise NotImplementedError(f"{head_first=}, {use_qk_l2norm_in_kernel=}: only False and True are there")
    repeats = v.shape[2] // k.shape[2]
    query, key = (_normalized(x[0].float()).repeat_interleave(repeats, dim=1) for x in (q, k))
    query = query * k.shape[-1] ** -0.5
    value, decay, rate = v[0].float(), g[0].float().exp(), beta[0].float()
    out, chunks, starts = torch.empty_like(value), [], cu_seqlens.tolist()
    for request, slot in enumerate(initial_state_indices.tolist()):
        state = initial_state[slot].float()
        for row in range(starts[request], starts[request + 1]):
            if (row - starts[request]) % CHUNK_TOKENS == 0:
                chunks.append(state.clone())
            state = state * decay[row, :, None, None]
            change = rate[row, :, None] * (value[row] - _read(state, key[row]))
            state = state + change[:, :, None] * key[row, :, None]
            out[row] = _read(state, query[row])
        initial_state[slot] = state.to(initial_state.dtype)
    return out[None].to(v.dtype), None, torch.stack(chunks)[None]


def _normalized(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def _read(state: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """state [H, V, K], vector [H, K] -> [H, V]."""
    return (state @ vector[:, :, None])[:, :, 0]


def _activated(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    return silu(x) if activation in ("silu", "swish") else x


@torch.library.custom_op("sgl_kernel::fused_gdn_gating_cpu", mutates_args=())
def fused_gdn_gating_cpu(
    A_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """a, b [T, Hv], A_log, dt_bias [Hv] -> g (the decay's logarithm), beta, both [1, T, Hv] float32."""
    decay = -A_log.float().exp() * softplus(a.float() + dt_bias.float())
    return decay[None], b.float().sigmoid()[None]


@torch.library.custom_op(
    "sgl_kernel::fused_sigmoid_gating_delta_rule_update_cpu", mutates_args=("initial_state_source",)
)
def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    softplus_beta: float,
    softplus_threshold: float,
) -> torch.Tensor:
    """Gates, then the rule, for one new token of each request."""
    g, beta = fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    return chunk_gated_delta_rule_cpu(
        q, k, v, g, beta, initial_state_source, cu_seqlens, False, use_qk_l2norm_in_kernel, initial_state_indices
    )[0]


@torch.library.custom_op("sgl_kernel::fused_sigmoid_mul_cpu", mutates_args=("x",))
def fused_sigmoid_mul_cpu(x: torch.Tensor, gate: torch.Tensor) -> None:
    """x [T, H * D] *= sigmoid(gate), gate [T, H * D] or [T, H, D]."""
    x *= gate.reshape(x.shape).sigmoid()


@torch.library.custom_op("sgl_kernel::fused_qk_gemma_rmsnorm_cpu", mutates_args=())
def fused_qk_gemma_rmsnorm_cpu(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [T, any * D] -> each head's vector normalized [any, D]; weights are stored less one, as Gemma's are."""
    query, key = q.reshape(-1, head_dim), k.reshape(-1, head_dim)
    return _gemma_rmsnorm(query, q_weight, eps), _gemma_rmsnorm(key, k_weight, eps)


@torch.library.custom_op("sgl_kernel::fused_qk_gemma_rmsnorm_with_gate_cpu", mutates_args=())
def fused_qk_gemma_rmsnorm_with_gate_cpu(
    q_gate: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    head_dim: int,
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As fused_qk_gemma_rmsnorm_cpu, of q_gate [T, Hq * 2 * D], each head's query and gate -> q, k, gate [any, D]."""
    q, gate = q_gate.reshape(-1, num_heads, 2, head_dim).unbind(2)
    q_norm, k_norm = fused_qk_gemma_rmsnorm_cpu(q, k, q_weight, k_weight, eps, head_dim)
    return q_norm, k_norm, gate.reshape(-1, head_dim).clone()


def _gemma_rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    normed = x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed * (1 + weight.float())).to(x.dtype)


@torch.library.custom_op("sgl_kernel::fused_qkvzba_split_reshape_cat_contiguous_cpu", mutates_args=())
def fused_qkvzba_split_reshape_cat_contiguous_cpu(
    mixed_qkvz: torch.Tensor, mixed_ba: torch.Tensor, num_heads_qk: int, num_heads_v: int, head_qk: int, head_v: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[T, all q, k, v, z] and [T, all b, a] -> qkv [T, all q, k, v], z [T, Hv, V], b, a [T, Hv]."""
    qkv, z = mixed_qkvz.split((2 * num_heads_qk * head_qk + num_heads_v * head_v, num_heads_v * head_v), dim=1)
    b, a = mixed_ba.chunk(2, dim=1)
    # An op of torch's may not return parts of what it was given.
    return qkv.clone(), z.reshape(-1, num_heads_v, head_v).clone(), b.clone(), a.clone()
