"""Which Hugging Face models the cache can hold, and the shape of their keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from deltastore_kernels.layout import HEAD_DIMS, PageLayout

_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class AttentionShape:
    """heads_by_layer: KV heads of each layer; windows: each layer's sliding window in tokens, or None."""

    heads_by_layer: list[int]
    head_dim: int
    windows: list[int | None]


def attention_shape(config: PreTrainedConfig) -> AttentionShape:
    """The shape of a model's KV cache, from its configuration. Raises ValueError for one we cannot hold."""
    decoder = config.get_text_config(decoder=True)
    name = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])

    def refuse(what: str, got: Any, allowed: Any) -> None:
        raise ValueError(f"{name}: {what} is {got}; allowed is {allowed}; run this model without DeltaStore's cache")

    if getattr(config, "is_encoder_decoder", False):
        refuse("is_encoder_decoder", True, "a decoder-only model")
    if rank := getattr(decoder, "kv_lora_rank", None):
        refuse("kv_lora_rank", rank, "none: the cache holds keys and values per head, not latents (MLA)")
    if shared := getattr(decoder, "num_kv_shared_layers", None):
        refuse("num_kv_shared_layers", shared, "0: one KV cache for each layer")
    query_heads = getattr(decoder, "num_attention_heads", None)
    if not query_heads:
        refuse("num_attention_heads", query_heads, "a number: a model with standard attention")
    window = getattr(decoder, "sliding_window", None)
    only_type = "sliding_attention" if window else "full_attention"
    layer_types = getattr(decoder, "layer_types", None) or [only_type] * decoder.num_hidden_layers
    if unknown := sorted(set(layer_types) - set(_LAYER_TYPES)):
        refuse("layer_types", unknown, _LAYER_TYPES)
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // query_heads
    if head_dim > max(HEAD_DIMS):
        refuse("head_dim", head_dim, f"at most {max(HEAD_DIMS)}")
    heads = getattr(decoder, "num_key_value_heads", None) or query_heads
    return AttentionShape(
        heads_by_layer=[heads] * decoder.num_hidden_layers,
        head_dim=head_dim,
        windows=[window if layer_type == "sliding_attention" else None for layer_type in layer_types],
    )


def check_shapes(layout: PageLayout, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raises ValueError when keys or values [B, H, T, D] are not shaped as the configuration promised."""
    for name, got, dim in (("keys", key, layout.key_dim), ("values", value, layout.value_dim)):
        if (got.shape[1], got.shape[3]) != (expected := (layout.num_kv_heads, dim)):
            raise ValueError(
                f"{name} of shape {tuple(got.shape)}: KV heads and head_dim are {(got.shape[1], got.shape[3])}; the "
                f"model's configuration promises {expected}; run this model without DeltaStore's cache"
            )
