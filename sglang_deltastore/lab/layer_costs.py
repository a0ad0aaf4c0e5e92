"""What each layer of a transformers model loses at each format, measured one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from transformers import PreTrainedModel

from deltastore_kernels.basis import KeyBasis
from deltastore_kernels.layout import RAW, Format

from ..policy.allocation import FORMATS
from ..policy.calibration import Calibration
from ..policy.tiers import Tier
from .cache import DeltaStoreCache

FINEST = Format(4, 4)
#: Keys and values are varied one at a time; a pair of formats costs what its two sides cost.
MEASURED = (FINEST, *(Format(bits, 4) for bits in (3, 2)), *(Format(4, bits) for bits in (3, 2)))

_PROBE = Tier("probe", "one layer packed, the others raw", RAW)


@torch.inference_mode()
def layer_costs(
    model: PreTrainedModel,
    key_bases: Sequence[KeyBasis],
    token_ids: torch.Tensor,
    tick: Callable[[], None] = lambda: None,
) -> list[dict[Format, float]]:
    """KL(original || one layer packed), mean over all positions of token_ids [N, T], for each layer and each of
    FORMATS; `tick()` after each of the layers * len(MEASURED) * N passes."""
    layers = range(len(key_bases))
    measured = [dict.fromkeys(MEASURED, 0.0) for _ in layers]
    for ids in token_ids:
        base = model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)
        for layer, fmt in product(layers, MEASURED):
            formats = tuple(fmt if index == layer else RAW for index in layers)
            cache = DeltaStoreCache(
                model.config,
                _PROBE,
                quantize_at_once=True,
                calibration=Calibration("", tuple(key_bases), {_PROBE.name: formats}),
            )
            packed = model(ids[None], past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
            measured[layer][fmt] += (base.exp() * (base - packed)).sum(-1).mean().item() / len(token_ids)
            tick()
    return [{fmt: _cost(row, fmt) for fmt in FORMATS} for row in measured]


def _cost(measured: dict[Format, float], fmt: Format) -> float:
    """The finest format's cost and what each side loses beyond it."""
    finest = measured[FINEST]
    key, value = measured[Format(fmt.key_bits, 4)], measured[Format(4, fmt.value_bits)]
    return finest + max(key - finest, 0.0) + max(value - finest, 0.0)
