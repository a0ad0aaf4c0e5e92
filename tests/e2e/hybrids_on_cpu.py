"""A plugin of SGLang's for tests: hybrid models on a CPU, where SGLang 0.5.23 serves none with a prefix cache.

It lifts SGLang's own check of the platform, which stands for two things that its CPU path lacks and that are here:
states at a prompt's chunks (our stand-in for sgl_kernel returns them), and in torch what is a Triton kernel there.
Nothing of this is DeltaStore's: a server without this module does not start a hybrid on a CPU.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import sigmoid, silu

_BACKEND = "sglang.srt.layers.attention.hybrid_linear_attn_backend"
_MAMBA2 = "sglang.srt.layers.attention.mamba.mamba"


def install(folder: Path) -> Path:
    """A distribution in `folder`, to be put into PYTHONPATH, with this module as SGLang's plugin."""
    info = folder / "hybrids_on_cpu-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hybrids-on-cpu\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\nhybrids_on_cpu = {__name__}:register\n")
    return folder


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, ours in (
        ("sglang.srt.arg_groups.mamba_hook._platform_supports_mamba_cache_extra_buffer", lambda: True),
        ("sglang.kernels.ops.attention.fla.fused_norm_gate.FusedRMSNormGated.forward", gated_norm),
        ("sglang.kernels.ops.attention.fla.layernorm_gated.RMSNorm.forward", gated_norm),
        ("sglang.srt.models.qwen2_moe.fused_gate_sigmoid_mul_add", add_shared_expert),
        ("torch.get_device_module", lambda _device=None: torch.cpu),  # torch's CUDA build says cuda, driver or not
        ("torch.Tensor.pin_memory", lambda tensor: tensor),  # so it does for pinned memory
        (f"{_BACKEND}.MambaAttnBackendBase._track_mamba_state_decode", keep_states_of_layer),
        (f"{_BACKEND}.track_mamba_states_if_needed", keep_states),
        (f"{_MAMBA2}.mamba_chunk_scan_combined", scan),
        (f"{_MAMBA2}.selective_state_update", update),
    ):
        HookRegistry.register(target, ours, HookType.REPLACE)
    HookRegistry.register(f"{_MAMBA2}.MambaMixer2.__init__", _bind_convolutions, HookType.BEFORE)


def _bind_convolutions(*_args: Any, **_kwargs: Any) -> None:
    """SGLang's Mamba-2 layers look for them where on a CPU nobody has put them."""
    from sgl_kernel.mamba import causal_conv1d_fn_cpu, causal_conv1d_update_cpu
    from sglang.srt.layers.attention.mamba import mamba

    mamba.causal_conv1d_fn = mamba.causal_conv1d_fn_triton = causal_conv1d_fn_cpu
    mamba.causal_conv1d_update = mamba.causal_conv1d_update_triton = causal_conv1d_update_cpu


def gated_norm(self: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x, gate [T, D]: the norm of x, gated."""
    normed = x.float() * (x.float().square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight.float()
    gated = sigmoid(gate.float()) if self.activation == "sigmoid" else silu(gate.float())
    return (normed * gated).to(x.dtype)


def add_shared_expert(
    hidden: torch.Tensor, gate_weight: torch.Tensor, shared: torch.Tensor, final: torch.Tensor
) -> None:
    """hidden, shared, final [T, D], gate_weight [D]: final += the shared expert's output, gated by its token."""
    final += shared * (hidden @ gate_weight)[:, None].sigmoid()


def keep_states(
    conv_states: torch.Tensor,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    mask: torch.Tensor,
    track_indices: torch.Tensor,
    *_args: Any,
    **_kwargs: Any,
) -> None:
    """A decode step's states, where it is time to keep them, into the slots that keep them."""
    for states in (conv_states, ssm_states):
        states[track_indices[mask].long()] = states[cache_indices[mask].long()]


def keep_states_of_layer(
    self: Any, forward_batch: Any, conv_states: torch.Tensor, ssm_states: torch.Tensor, cache_indices: torch.Tensor,
    _layer_id: int | None = None,
) -> None:  # fmt: skip
    mask = forward_batch.mamba_track_mask
    if mask is not None:
        keep_states(conv_states, ssm_states, cache_indices, mask, self.forward_metadata.mamba_track_indices)


def _selective_step(
    state: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, decay: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2's recurrence for one token: state [..., H, P, N], x [..., H, P], dt [..., H], decay [H], b, c [..., G, N]
    -> the next state, its output [..., H, P]."""
    b, c = (group.repeat_interleave(x.shape[-2] // group.shape[-2], dim=-2).float() for group in (b, c))
    state = state * (dt * decay).exp()[..., None, None] + (dt[..., None] * x.float())[..., None] * b[..., None, :]
    return state, (state @ c[..., None])[..., 0]


def scan(
    x: torch.Tensor, dt: torch.Tensor, decay: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, chunk_size: int,
    D: torch.Tensor, dt_bias: torch.Tensor, cu_seqlens: torch.Tensor, initial_states: torch.Tensor | None,
    track_seq_idx: torch.Tensor | None, track_end_locs: torch.Tensor | None, out: torch.Tensor,
    state_dtype: torch.dtype, **_others: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """mamba_chunk_scan_combined, token by token, over requests that follow one another: x [1, T, H, P], dt [1, T, H],
    decay (A), D, dt_bias [H], b, c [1, T, G, N]; into out. Returns the states before every chunk_size tokens of all,
    the requests' last ones, and those after the tokens before track_end_locs."""
    ends = set([] if track_end_locs is None else track_end_locs.tolist())
    starts, at_chunks, last, at_ends = cu_seqlens.tolist(), [], [], {}
    rates = torch.nn.functional.softplus(dt[0].float() + dt_bias.float())
    for request, (first, end) in enumerate(itertools.pairwise(starts)):
        state = torch.zeros(*x.shape[2:], b.shape[-1]) if initial_states is None else initial_states[request].float()
        for row in range(first, end):
            if row % chunk_size == 0:
                at_chunks.append(state)
            state, read = _selective_step(state, x[0, row], rates[row], decay.float(), b[0, row], c[0, row])
            out[0, row] = read + D[:, None] * x[0, row]
            if row + 1 in ends:
                at_ends[row + 1] = state
        last.append(state)
    tracked = [at_ends[end] for end in ([] if track_end_locs is None else track_end_locs.tolist())]
    return (
        torch.stack(at_chunks)[None].to(state_dtype),
        torch.stack(last).to(state_dtype),
        torch.stack(tracked)[None].to(state_dtype) if tracked else None,
    )


def update(
    states: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, decay: torch.Tensor, b: torch.Tensor, c: torch.Tensor,
    D: torch.Tensor, *, dt_bias: torch.Tensor, state_batch_indices: torch.Tensor, out: torch.Tensor, **_others: Any,
) -> None:  # fmt: skip
    """selective_state_update for one token of each request: states [slots, H, P, N], x, dt [B, H, P] (dt the same in
    each head), decay [H, P, N], D, dt_bias [H, P], b, c [B, G, N]; into out [B, H, P]."""
    slots = state_batch_indices.long()
    rates = torch.nn.functional.softplus(dt[:, :, 0].float() + dt_bias[:, 0].float())
    state, read = _selective_step(states[slots].float(), x, rates, decay[:, 0, 0], b, c)
    states[slots] = state.to(states.dtype)
    out.copy_(read + D * x)
