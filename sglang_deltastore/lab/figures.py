"""What the DeltaStore reports say of a model's keys, values and attention, measured; no compression.

Legend: B sequences, H KV heads, T tokens, D head_dim, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import combinations, pairwise

import torch
from torch import Tensor

from .peers import hadamard

EVICTED_TO = (0.5, 0.3, 0.1)
"""Shares of a prefix that are kept."""
_SMALLEST = 2.0**-40  # a channel that never changes has a range nevertheless

Row = dict[str, str | float | None]


def figures(model: torch.nn.Module, token_ids: Tensor) -> list[Row]:
    """Rows {figure, value, claimed}; value None where a model has no such thing.

    token_ids [B, T]. Raises ValueError for an attention implementation other than "eager".
    """
    return measurements(capture(model, token_ids)) + eviction_rows(model, token_ids)


def capture(model: torch.nn.Module, token_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """One forward pass of a Hugging Face causal LM over token_ids [B, T] -> each layer's key (after RoPE) and
    value, [B, H, T, D] float32. A layer with a sliding window gives its last tokens alone."""
    with torch.inference_mode():
        cache = model(token_ids, use_cache=True).past_key_values
    return [(layer.keys.float(), layer.values.float()) for layer in cache.layers]


def measurements(model_kv: Sequence[tuple[Tensor, Tensor]]) -> list[Row]:
    """Rows from what `capture` returns."""
    keys, values = ([pair[side] for pair in model_kv] for side in (0, 1))
    rows = []
    for label, side in (("keys", keys), ("values", values)):
        ranges = [channel_range_ratio(x) for x in side]
        rotated = [channel_range_ratio(x @ hadamard(x.shape[-1]).to(x)) for x in side]
        rows += [
            _row(f"channel range ratio of {label}, median layer", ranges, _median, "24.9"),
            _row(f"channel range ratio of {label}, rotated, median layer", rotated, _median, "3.9"),
        ]
    for label, side in (("keys", keys), ("values", values)):
        pairs = [pair for pair in pairwise(side) if pair[0].shape == pair[1].shape]
        rows += [
            _row(
                f"correlation of neighbouring layers' {label}, mean size",
                [abs(correlation(low, high)) for low, high in pairs],
                _mean,
                "nearly 0",
            ),
            _row(
                f"size of neighbouring layers' delta of {label} to the original's, mean",
                [float((high - low).norm() / high.norm()) for low, high in pairs],
                _mean,
                "> 1",
            ),
        ]
    for label, side in (("keys", keys), ("values", values)):
        rows.append(_row(f"largest cosine of two KV heads' {label}", head_cosines(side), max, "0.73"))
    return rows


def _row(name: str, found: Sequence[float], summary: Callable[[Sequence[float]], float], claimed: str) -> Row:
    return {"figure": name, "value": summary(found) if found else None, "claimed": claimed}


def _mean(figures: Sequence[float]) -> float:
    return sum(figures) / len(figures)


def _median(figures: Sequence[float]) -> float:
    return float(torch.tensor(figures).median())


def channel_range_ratio(x: Tensor) -> float:
    """x [B, H, T, D] -> largest range (greatest - least over the tokens) of a head's channels to the smallest;
    mean over sequences and heads."""
    spread = x.amax(-2) - x.amin(-2)
    return float((spread.amax(-1) / spread.amin(-1).clamp_min(_SMALLEST)).mean())


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's r over all entries of two tensors of one shape."""
    return float(torch.corrcoef(torch.stack((x.flatten(), y.flatten())))[0, 1])


def head_cosines(layers: Sequence[Tensor]) -> list[float]:
    """Cosine of every pair of KV heads of each layer [B, H, T, D], over all tokens and channels."""
    heads = [[x[:, head].flatten() for head in range(x.shape[1])] for x in layers]
    return [float(torch.cosine_similarity(a, b, dim=0)) for layer in heads for a, b in combinations(layer, 2)]


def importance(attentions: Sequence[Tensor]) -> Tensor:
    """Each layer's attention weights [B, Hq, Q, T] -> what each token received, summed over queries and heads:
    [L, B, T]."""
    return torch.stack([weights.float().sum((1, 2)) for weights in attentions])


def one_for_all_layers(importances: Tensor) -> Tensor:
    """importances [L, B, T] -> their mean over the layers, for every layer."""
    return importances.mean(0, keepdim=True).expand_as(importances)


def kept_tokens(importances: Tensor, share: float) -> Tensor:
    """importances [L, B, T] -> bool [L, B, T], true for the `share` of tokens with the most, at least one."""
    count = max(1, round(share * importances.shape[-1]))
    top = importances.topk(count, dim=-1).indices
    return torch.zeros_like(importances, dtype=torch.bool).scatter_(-1, top, True)


@contextmanager
def evicted(layers: Sequence[torch.nn.Module], keep: Tensor) -> Iterator[None]:
    """While open, queries after the prefix do not see its evicted tokens.

    layers: the attention modules, which take an additive `attention_mask` [B, 1, T, T] by name (attention
    implementation "eager"); keep [L, B, prefix] bool.
    """
    prefix = keep.shape[-1]

    def hide(kept: Tensor, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs["attention_mask"].clone()
        mask[..., prefix:, :prefix].masked_fill_(~kept[:, None, None], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    handles = [
        layer.register_forward_pre_hook(partial(hide, kept), with_kwargs=True)
        for layer, kept in zip(layers, keep, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def eviction_rows(model: torch.nn.Module, token_ids: Tensor, shares: Sequence[float] = EVICTED_TO) -> list[Row]:
    """Prefill the first half of token_ids [B, T], evict, read on: KL of the second half's next tokens, with
    each layer's own choice of tokens and with one for all layers.

    Importance is what the prefix's own queries gave. model: a Hugging Face causal LM with
    attn_implementation="eager" whose attention modules are named `self_attn`.
    """
    if model.config._attn_implementation != "eager":
        raise ValueError(
            f"attention implementation {model.config._attn_implementation!r}: eviction_rows needs 'eager', whose "
            "weights can be read; use model.set_attn_implementation('eager')"
        )
    prefix = token_ids.shape[-1] // 2
    found = importance(model(token_ids[:, :prefix], output_attentions=True, use_cache=False).attentions)
    layers = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    plain = model(token_ids, use_cache=False).logits[:, prefix:].log_softmax(-1)

    def divergence(importances: Tensor, share: float) -> float:
        with evicted(layers, kept_tokens(importances, share)):
            logits = model(token_ids, use_cache=False).logits[:, prefix:].log_softmax(-1)
        return float((plain.exp() * (plain - logits)).sum(-1).mean())

    choices = (("each layer its own", found, "less"), ("one choice for all layers", one_for_all_layers(found), "more"))
    return [
        _row(f"KL with {share:.0%} of the prefix kept, {label}", [divergence(importances, share)], _mean, claimed)
        for share in shares
        for label, importances, claimed in choices
    ]
