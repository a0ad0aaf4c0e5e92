"""What compression does to a model's predictions: KL divergence, top-1 agreement and perplexity.

Two protocols, both teacher-forced over sequences of T tokens of a text:

    all       one pass; every query reads every key and value as compression leaves it, its own too.
              Scored from position 32 on.
    continue  the first tokens, half of them unless told otherwise, are one raw pass and are then compressed; the
              others go on from them in chunks, as the server would. Scored on the others.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

PROTOCOLS = ("all", "continue")
FIRST_SCORED_POSITION = 32
"""Before it, a prediction rests on next to nothing."""
CHUNK_TOKENS = 256
"""New tokens of one pass in protocol `continue`."""
SCORED_ROWS = 64
"""Rows of logits that are scored at once: bounds memory with large vocabularies."""
GRADES = ((0.01, "EXCELLENT"), (0.05, "GOOD"), (0.20, "ACCEPTABLE"), (0.50, "MARGINAL"))
"""Mean KL below which a grade holds; above all: FAILED (the DeltaStore reports' bounds)."""


class Candidate(Protocol):
    """A configuration to measure: one row for each protocol."""

    name: str
    source: str
    protocols: tuple[str, ...]

    @property
    def needs_attention(self) -> bool:
        """Whether what it keeps follows from the attention of the pass that fills it."""
        ...

    def cache(self, model: PreTrainedModel, quantize_at_once: bool) -> Cache:
        """A new, empty cache for one sequence."""
        ...

    def bits_per_value(self, cache: Cache, model: PreTrainedModel) -> float:
        """All-in bits of a value of the context, once `cache` has run a sequence."""
        ...


@dataclass
class Scores:
    """What was found at each scored position; nats."""

    kl: list[torch.Tensor] = field(default_factory=list)
    agrees: list[torch.Tensor] = field(default_factory=list)
    loss_base: list[torch.Tensor] = field(default_factory=list)
    loss: list[torch.Tensor] = field(default_factory=list)

    def add(self, base_logits: torch.Tensor, logits: torch.Tensor, next_ids: torch.Tensor) -> None:
        """base_logits, logits [N, V] at consecutive positions; next_ids the tokens that follow, [N] or [N - 1]."""
        for begin in range(0, len(logits), SCORED_ROWS):
            rows = slice(begin, begin + SCORED_ROWS)
            base, ours = (part[rows].float().log_softmax(-1) for part in (base_logits, logits))
            self.kl.append(((base.exp() * (base - ours)).sum(-1)).clamp_min(0).cpu())
            self.agrees.append((base.argmax(-1) == ours.argmax(-1)).float().cpu())
            ids = next_ids[rows, None]
            self.loss_base.append(-base[: len(ids)].gather(1, ids)[:, 0].cpu())
            self.loss.append(-ours[: len(ids)].gather(1, ids)[:, 0].cpu())

    def metrics(self) -> dict[str, Any]:
        """The row's figures: KL(original || compressed) in nats, top1 as a share, perplexities."""
        kl = torch.cat(self.kl).double()
        mean = kl.mean().item()
        return {
            "kl_mean": mean,
            "kl_median": kl.quantile(0.5).item(),
            "kl_p999": kl.quantile(0.999).item(),
            "kl_max": kl.max().item(),
            "top1": torch.cat(self.agrees).double().mean().item(),
            "ppl_base": torch.cat(self.loss_base).double().mean().exp().item(),
            "ppl": torch.cat(self.loss).double().mean().exp().item(),
            "grade": grade(mean),
        }


def grade(kl_mean: float) -> str:
    return next((name for bound, name in GRADES if kl_mean < bound), "FAILED")


def sequences(tokenizer: PreTrainedTokenizerBase, text: str, count: int, tokens: int, seed: int) -> torch.Tensor:
    """`count` sequences [count, tokens] int64 from `text`, which do not overlap; `seed` picks where they start.

    A model whose tokenizer begins every text with a token (BOS) gets it in front of each sequence.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    begins = [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []
    ids, body = ids[len(begins) :], tokens - len(begins)
    if len(ids) < count * body:
        raise ValueError(
            f"the text has {len(ids)} tokens; {count} sequences of {tokens} need {count * body}; "
            "give a longer text, or lower --sequences or --tokens"
        )
    # The gaps between sequences are a random split of the tokens left over.
    generator = random.Random(seed)
    cuts = sorted(generator.randint(0, len(ids) - count * body) for _ in range(count))
    starts = [cut + i * body for i, cut in enumerate(cuts)]
    return torch.tensor([begins + ids[start : start + body] for start in starts])


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    candidates: list[Candidate],
    protocols: tuple[str, ...],
    tick: Callable[[str], None] = lambda _: None,
    new_tokens: int | None = None,
    first_position: int = 0,
) -> list[dict[str, Any]]:
    """A row for each candidate and protocol over sequences token_ids [N, T]; `tick(name)` before each pass.

    new_tokens: those that protocol `continue` scores, the last ones; None: half of each sequence. first_position: of a
    sequence's first token, as if it lay somewhere else in a long context; RoPE turns keys and queries with it.

    ratio           16 / bits_per_value: the pages that hold the tokens, and frames while a tile is unfinished
    ratio_resident  by everything the cache holds, of one short sequence: also an empty frame, the page and the
                    frame that belong to nobody, pages free for growth; None where nothing is packed

    A sequence's original logits, keys and values are computed once and held while all candidates run over it.
    """
    scores: dict[tuple[int, str], Scores] = {}
    bits: dict[tuple[int, str], float] = {}
    ratios: dict[tuple[int, str], float | None] = {}
    tokens = token_ids.shape[1]
    stored = tokens - new_tokens if new_tokens else tokens // 2
    first_scored = min(FIRST_SCORED_POSITION if protocol == "all" else stored for protocol in protocols)
    for ids in token_ids.to(model.device):
        tick("original")
        original = DynamicCache()
        base_logits = _logits(model, ids, tokens - first_scored, original, first_position)
        for index, candidate in enumerate(candidates):
            for protocol in protocols:
                if protocol not in candidate.protocols:
                    continue
                tick(candidate.name)
                cache = candidate.cache(model, quantize_at_once=protocol == "all")
                if protocol == "all":
                    scored = _one_pass(model, ids, cache, first_position)
                elif not candidate.needs_attention:
                    _store(cache, original, stored)
                    scored = _continued(model, ids, cache, stored, first_position)
                else:
                    _logits(model, ids[:stored], 1, cache, first_position)
                    scored = _continued(model, ids, cache, stored, first_position)
                kept = scores.setdefault((index, protocol), Scores())
                for begin, logits in scored:
                    end = begin + len(logits)
                    kept.add(base_logits[begin - first_scored : end - first_scored], logits, ids[begin + 1 : end + 1])
                bits[index, protocol] = candidate.bits_per_value(cache, model)
                ratios[index, protocol] = cache.ratio() if hasattr(cache, "ratio") else None
    return [
        {
            "protocol": protocol,
            "config": candidates[index].name,
            "source": candidates[index].source,
            "bits_per_value": bits[index, protocol],
            "ratio": 16 / bits[index, protocol],
            "ratio_resident": ratios[index, protocol],
            **kept.metrics(),
        }
        for (index, protocol), kept in sorted(scores.items(), key=lambda item: PROTOCOLS.index(item[0][1]))
    ]


@torch.inference_mode()
def measure_in_chunks(
    model: PreTrainedModel,
    ids: torch.Tensor,
    sides: Mapping[str, tuple[PreTrainedModel, Cache]],
    chunk_tokens: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Scores]:
    """What each side, a model with an empty cache, makes of ids [T] in chunks, as a server computes a long prompt: a
    chunk reads those before it as the cache has stored them, and itself raw. Scored are all chunks but the first,
    against `model` with a cache of its own; all sides take a chunk before the next one, so that no more logits are held
    than a chunk's. `tick()` after each chunk."""
    scores = {name: Scores() for name in sides}
    original = DynamicCache()
    for begin in range(0, len(ids), chunk_tokens):
        chunk, following = ids[begin : begin + chunk_tokens], ids[begin + 1 : begin + chunk_tokens + 1]
        scored = len(chunk) if begin else 1
        base = _logits(model, chunk, scored, original, 0)
        for name, (side, cache) in sides.items():
            logits = _logits(side, chunk, scored, cache, 0)
            if begin:
                scores[name].add(base, logits, following)
        tick()
    return scores


def passes(candidates: list[Candidate], protocols: tuple[str, ...]) -> int:
    """How often `measure` ticks for one sequence."""
    return 1 + sum(protocol in candidate.protocols for candidate in candidates for protocol in protocols)


def _store(cache: Cache, original: DynamicCache, tokens: int) -> None:
    """The first `tokens` of `original` into an empty cache, as a pass over them would."""
    for index, layer in enumerate(original.layers):
        cache.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens], index)


Scored = Iterator[tuple[int, torch.Tensor]]
"""A position, and logits [N, V] from there on: all that are scored, in order."""


def _one_pass(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, first_position: int) -> Scored:
    yield FIRST_SCORED_POSITION, _logits(model, ids, len(ids) - FIRST_SCORED_POSITION, cache, first_position)


def _continued(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, stored: int, first_position: int) -> Scored:
    for begin in range(stored, len(ids), CHUNK_TOKENS):
        chunk = ids[begin : begin + CHUNK_TOKENS]
        yield begin, _logits(model, chunk, len(chunk), cache, first_position)


def _logits(model: PreTrainedModel, ids: torch.Tensor, last: int, cache: Cache, first_position: int) -> torch.Tensor:
    """[last, V]: of the last tokens of ids [T], which follow on the cache's. Most models compute no others; a large
    vocabulary's take more memory and time than all layers."""
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = last
    if first_position:
        begin = first_position + cache.get_seq_length()
        options["position_ids"] = torch.arange(begin, begin + len(ids), device=ids.device)[None]
    logits: torch.Tensor = model(ids[None], past_key_values=cache, use_cache=True, **options).logits[0, -last:]
    return logits
