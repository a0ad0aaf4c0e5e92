"""What each layer needs: in one forward pass, copies of the same tokens, each with one layer's stored side rounded.

Copy 0 reads everything as it was; copy 1 + 2 l reads layer l's stored keys rounded, copy 2 + 2 l its values. How far a
copy's last hidden states are from copy 0's says what that layer's rounding costs behind that context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from deltastore_kernels import ops
from deltastore_kernels.basis import Basis, KeyBasis
from deltastore_kernels.layout import TILE_TOKENS, PageLayout
from deltastore_kernels.ops._attention import attend_rows

from ..policy.allocation import PROBED, Needs
from ..store.size import SINK_TOKENS
from .prompts import prompts
from .scoring import scoring_of

TOKENS = 2 * TILE_TOKENS
"""Tokens that are looked at, behind each context."""
SHORT_CONTEXT_TOKENS = 480
LEAST_CONTEXT_TOKENS = 4 * TILE_TOKENS


def contexts(sequence_tokens: int) -> list[int]:
    """Stored tokens to probe behind: a short context and, where it is another, the longest of the sequence."""
    longest = (sequence_tokens - TOKENS) // TILE_TOKENS * TILE_TOKENS
    return [each for each in sorted({min(SHORT_CONTEXT_TOKENS, longest), longest}) if each >= LEAST_CONTEXT_TOKENS]


def probe(
    model: Any,
    layers: Sequence[Any],
    token_ids: torch.Tensor,
    stored: Sequence[tuple[torch.Tensor, torch.Tensor]],
    bases: Sequence[KeyBasis],
    context_tokens: int,
) -> Needs:
    """token_ids [T]; stored: each layer's key, value [T, H, D] of them, this rank's heads; bases: the layers'."""
    device = token_ids.device
    load = ops.load("auto", device.type)
    sides = [
        _with_rounded(*(side[:context_tokens] for side in of_layer), Basis(load, basis.to(device)), load)
        for of_layer, basis in zip(stored, bases, strict=True)
    ]
    copies = 1 + 2 * len(layers)
    new_ids = token_ids[context_tokens : context_tokens + TOKENS]
    batch = prompts(new_ids, context_tokens, copies, all_logits=True)
    with forward_context(ForwardContext(attn_backend=_Copies(layers, sides))):
        logits = model.forward(batch.input_ids, batch.positions, batch).next_token_logits.view(copies, TOKENS, -1)
    exact = logits[0].float().log_softmax(-1)
    loss = torch.stack([(exact.exp() * (exact - copy.float().log_softmax(-1))).sum(-1).mean() for copy in logits])
    return Needs(context_tokens, tuple(loss[1::2].tolist()), tuple(loss[2::2].tolist()))


def _with_rounded(key: torch.Tensor, value: torch.Tensor, basis: Basis, load: Any) -> tuple[torch.Tensor, ...]:
    """key, value [N, H, D] of whole tiles -> key, value, and both as pages of PROBED give them back, each with room for
    TOKENS more: [H, N + TOKENS, D] float32."""
    tokens, heads, head_dim = key.shape
    layout = PageLayout(PROBED, heads, head_dim, TILE_TOKENS)
    pages = torch.empty(tokens // TILE_TOKENS, layout.page_bytes, dtype=torch.uint8, device=key.device)
    page_ids = torch.arange(len(pages), device=key.device)
    turned = (basis.rotate_key(key.float()), basis.rotate_value(value.float()))
    tiles = (side.view(-1, TILE_TOKENS, heads, head_dim).transpose(1, 2) for side in turned)
    load.encode(*tiles, page_ids, torch.zeros_like(page_ids), pages, layout, basis.key_shaping)
    rounded = [side.transpose(1, 2).reshape(tokens, heads, head_dim) for side in load.decode(pages, page_ids, layout)]
    back = (basis.restore_key(rounded[0].float()), basis.restore_value(rounded[1].float()))
    found = []
    for side, exact in ((key, key), (value, value), (back[0], key), (back[1], value)):
        whole = torch.empty(heads, tokens + TOKENS, head_dim, device=key.device)
        whole[:, :tokens] = side.transpose(0, 1)
        whole[:, :SINK_TOKENS] = exact[:SINK_TOKENS].transpose(0, 1)
        found.append(whole)
    return tuple(found)


class _Copies(AttentionBackend):
    """Each copy's queries over the stored context, rounded where it is that copy's turn, and over its own tokens.

    sides: each layer's `_with_rounded`."""

    token_to_kv_pool = req_to_token_pool = None

    def __init__(self, layers: Sequence[Any], sides: Sequence[tuple[torch.Tensor, ...]]) -> None:
        self._at = {layer.layer_id: index for index, layer in enumerate(layers)}
        self._sides = sides

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *_args: Any, **_: Any) -> Any:
        """q [copies * TOKENS, Hq * D], k, v [copies * TOKENS, H, D] -> as q."""
        at = self._at[layer.layer_id]
        key, value, key_rounded, value_rounded = self._sides[at]
        query = q.view(-1, TOKENS, layer.tp_q_head_num, layer.head_dim)
        own = [x.view(-1, TOKENS, layer.tp_k_head_num, layer.head_dim).transpose(1, 2) for x in (k, v)]
        out = torch.empty_like(query)
        for copy in range(len(query)):
            sides = (key_rounded if copy == 1 + 2 * at else key, value_rounded if copy == 2 + 2 * at else value)
            for side, new in zip(sides, own, strict=True):
                side[:, -TOKENS:] = new[copy]
            out[copy] = attend_rows(query[copy], *sides, scoring_of(layer))[0]
        return out.view(q.shape[0], -1)
