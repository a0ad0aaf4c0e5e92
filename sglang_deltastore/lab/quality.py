"""What compression does to a model's predictions: KL divergence, top-1 agreement and perplexity.

Two protocols, both teacher-forced over sequences of T tokens of a text:

    all       one pass; every query reads every key and value as compression leaves it, its own too.
              Scored from position 32 on.
    continue  the first half is one raw pass and is then compressed; the second half goes on from
              it in chunks, as the server would. Scored on the second half.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

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
) -> list[dict[str, Any]]:
    """A row for each candidate and protocol over sequences token_ids [N, T]; `tick(name)` before each pass.

    ratio           16 / bits_per_value: the pages that hold the tokens, and frames while a tile is unfinished
    ratio_resident  by everything the cache holds, of one short sequence: also an empty frame, the page and the
                    frame that belong to nobody, pages free for growth; None where nothing is packed

    A sequence's original logits are computed once and held while all candidates run over it.
    """
    scores: dict[tuple[int, str], Scores] = {}
    bits: dict[tuple[int, str], float] = {}
    ratios: dict[tuple[int, str], float | None] = {}
    first_scored = min(_first_scored(protocol, token_ids.shape[1]) for protocol in protocols)
    for ids in token_ids.to(model.device):
        tick("original")
        base_logits = _logits(model, ids, len(ids) - first_scored, use_cache=False)
        for index, candidate in enumerate(candidates):
            for protocol in protocols:
                if protocol not in candidate.protocols:
                    continue
                tick(candidate.name)
                cache = candidate.cache(model, quantize_at_once=protocol == "all")
                kept = scores.setdefault((index, protocol), Scores())
                for begin, logits in _run(model, ids, cache, protocol):
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


def passes(candidates: list[Candidate], protocols: tuple[str, ...]) -> int:
    """How often `measure` ticks for one sequence."""
    return 1 + sum(protocol in candidate.protocols for candidate in candidates for protocol in protocols)


def _first_scored(protocol: str, tokens: int) -> int:
    return FIRST_SCORED_POSITION if protocol == "all" else tokens // 2


def _run(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, protocol: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Positions and logits [N, V] from each of them on: all that are scored, in order."""
    begin = _first_scored(protocol, len(ids))
    if protocol == "all":
        yield begin, _logits(model, ids, len(ids) - begin, past_key_values=cache, use_cache=True)
        return
    _logits(model, ids[:begin], 1, past_key_values=cache, use_cache=True)
    for chunk in ids[begin:].split(CHUNK_TOKENS):
        yield begin, _logits(model, chunk, len(chunk), past_key_values=cache, use_cache=True)
        begin += len(chunk)


def _logits(model: PreTrainedModel, ids: torch.Tensor, last: int, **options: Any) -> torch.Tensor:
    """[last, V]: of the last tokens of ids [T]. Most models compute no others; a large vocabulary's take more memory
    and time than all layers."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = last
    logits: torch.Tensor = model(ids[None], **options).logits[0, -last:]
    return logits
