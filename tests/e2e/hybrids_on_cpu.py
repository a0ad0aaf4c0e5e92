"""A plugin of SGLang's for tests: hybrid models on a CPU, where SGLang 0.5.23 serves none with a prefix cache.

It lifts SGLang's own check of the platform, which stands for two things that its CPU path lacks and that are here:
states at a prompt's chunks (our stand-in for sgl_kernel returns them), and in torch what is a Triton kernel there.
Nothing of this is DeltaStore's: a server without this module does not start a hybrid on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import sigmoid, silu

_MAMBA = "sglang.srt.layers.attention.hybrid_linear_attn_backend"


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
        (f"{_MAMBA}.MambaAttnBackendBase._track_mamba_state_decode", keep_states),
    ):
        HookRegistry.register(target, ours, HookType.REPLACE)


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
    self: Any,
    forward_batch: Any,
    conv_states: torch.Tensor,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    layer_id: int | None = None,
) -> None:
    """A decode step's states, where it is time to keep them, into the slots that keep them."""
    mask = forward_batch.mamba_track_mask
    if mask is not None:
        kept = self.forward_metadata.mamba_track_indices[mask].long()
        for states in (conv_states, ssm_states):
            states[kept] = states[cache_indices[mask].long()]
