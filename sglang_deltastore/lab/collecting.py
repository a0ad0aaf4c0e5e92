"""What a transformers model's attention is called with, as it is called: moments of keys and queries, and the queries
that ExpectedAttention expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from ..policy.moments import SKIPPED_TOKENS, Moments
from .attention import attend
from .eviction.expected import ExpectedAttention, Queries, Turn

ATTENTION = "deltastore_moments"

Observe = Callable[[int, torch.Tensor, torch.Tensor, dict[str, Any]], None]
"""A layer's index, its query [B, Hq, T, D] and key [B, H, T, D] after RoPE, and attention's other options."""

_observe: Observe | None = None


@contextmanager
def observing(model: PreTrainedModel, observe: Observe) -> Iterator[None]:
    """While inside, each layer of the model's forward passes is told to `observe`."""
    global _observe  # noqa: PLW0603 (attention functions of transformers are called without any state of ours)
    before = model.config._attn_implementation
    _observe = observe
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _observe = None


@contextmanager
def collecting(model: PreTrainedModel) -> Iterator[list[Moments]]:
    """While inside, the model's forward passes add to the moments of its layers."""
    layers = [Moments() for _ in range(model.config.get_text_config(decoder=True).num_hidden_layers)]

    def add(layer: int, query: torch.Tensor, key: torch.Tensor, options: dict[str, Any]) -> None:
        layers[layer].is_capped = bool(options.get("softcap"))
        for one_query, one_key in zip(query, key, strict=True):
            layers[layer].add(one_query.transpose(0, 1), one_key.transpose(0, 1))

    with observing(model, add):
        yield layers


@torch.inference_mode()
def expected_attention(model: PreTrainedModel, token_ids: list[torch.Tensor]) -> ExpectedAttention:
    """Fitted to the model's queries over sequences, each [T]. Raises ValueError for a model that turns its layers' keys
    in more ways than one, or not at all."""
    turn = turn_of(model)
    found: dict[int, list[torch.Tensor]] = {}
    scalings = set()

    def add(layer: int, query: torch.Tensor, key: torch.Tensor, options: dict[str, Any]) -> None:
        unturned = turn(query.float(), -torch.arange(query.shape[2], device=query.device))
        by_kv_head = unturned[0, :, SKIPPED_TOKENS:].unflatten(0, (key.shape[1], -1)).flatten(1, 2)
        found.setdefault(layer, []).append(by_kv_head)
        scalings.add(options.get("scaling") or query.shape[-1] ** -0.5)

    with observing(model, add):
        for ids in token_ids:
            model.base_model(ids[None].to(model.device), use_cache=False)
    layers = [torch.cat(found[layer], 1) for layer in range(len(found))]
    means = [queries.mean(1) for queries in layers]
    covariances = [
        (queries - mean[:, None]).mT @ (queries - mean[:, None]) / queries.shape[1]
        for queries, mean in zip(layers, means, strict=True)
    ]
    (scaling,) = scalings
    return ExpectedAttention([Queries(*both) for both in zip(means, covariances, strict=True)], turn, scaling)


def turn_of(model: PreTrainedModel) -> Turn:
    """The model's own RoPE, over two halves of a head (Llama's, and most others'). Raises ValueError for a model that
    turns its layers' keys in more ways than one, or not at all."""
    rope = getattr(model.base_model, "rotary_emb", None)
    layer_types = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if rope is None or len(layer_types) > 1:
        raise ValueError(
            f"{type(model).__name__}: one RoPE for all layers is wanted; found "
            f"{'none' if rope is None else ', '.join(sorted(layer_types))}; take another model, or a method without"
        )

    def turn(x: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        cosine, sine = rope(x, distances[None])
        first, second = x.chunk(2, dim=-1)
        turned: torch.Tensor = x * cosine[0] + torch.cat((-second, first), -1) * sine[0]
        return turned

    return turn


def _attend(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> Any:
    assert _observe is not None, "calls are only observed inside `observing`"
    _observe(module.layer_idx, query, key, options)
    return attend(module, query, key, *args, **options)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, eager_mask)
