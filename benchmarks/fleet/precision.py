"""Precision by need, simulated: which policy, and whether it is worth it against fixed tiers in the same bytes.

    python -m benchmarks.fleet.precision --data FOLDER --model FOLDER

The first half of each trace's requests chooses among the policies of `policy.precision`, the second half, replayed from
an empty cache, judges. Loss is expected, not measured: the mean over tokens of what their level loses when a whole
context is stored at it (`level_kl`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from benchmarks.fleet import agents
from benchmarks.fleet.results import BUDGETS, find
from benchmarks.provenance import RESULTS, provenance, write_rows
from benchmarks.serving.workloads import Texts
from sglang_deltastore.fleet.kv import LEVELS, KvTier, parse_tier
from sglang_deltastore.fleet.page_pool import Cache
from sglang_deltastore.fleet.replay import Outcome, Replay, replay
from sglang_deltastore.fleet.study import Shape, parse_budget, shape_of
from sglang_deltastore.fleet.tables import Model, read_table
from sglang_deltastore.fleet.traces import Trace
from sglang_deltastore.policy.precision import LADDERS, RANKS, SGLANGS, Policy, recency

MODEL = "Llama-3-8B"
FIXED = ("lossless", "k4v2", "conservative", "k2v2")
ADAPTIVE = tuple(LADDERS)
CANDIDATES = tuple(Policy(rank, kept_share) for rank in RANKS.values() for kept_share in (0.0, 0.25))
AGENT_BUDGETS = ("8k", "16k", "32k", "64k", "1M")
"""What was recorded fits in 64k."""
KL_TOKENS = 2048


@dataclass(frozen=True)
class Source:
    """One trace: `pattern` is of its file; none: made from recorded agents."""

    name: str
    title: str
    budgets: tuple[str, ...] = BUDGETS
    pattern: str | None = None
    sessions_at_once: int = 16


SOURCES = (
    Source("mooncake-conversation", "Mooncake conversation", pattern="mooncake/conversation_trace*.jsonl*"),
    Source("mooncake-synthetic", "Mooncake synthetic", pattern="mooncake/synthetic_trace*.jsonl*"),
    Source("claude-code", "Claude Code", pattern="claude_code_traces/sessions.jsonl*", sessions_at_once=64),
    Source("airline", "airline agent", AGENT_BUDGETS),
    Source("tools", "tool calling", AGENT_BUDGETS),
)


@dataclass(frozen=True)
class Side:
    """A tier under a policy."""

    tier: str
    policy: Policy = SGLANGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="of the traces and the agents")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="whose tokenizer the agents have")
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.jsonl", metavar="FILE")
    args = parser.parse_args()
    model = read_table(Model, "models.toml")[MODEL]
    losses = level_kl()
    with tempfile.TemporaryDirectory() as folder:
        traces = {source: open_trace(source, args.data, args.model, Path(folder)) for source in SOURCES}
        tried = [Side(tier, policy) for tier in ADAPTIVE for policy in CANDIDATES]
        fixed = [Side(tier) for tier in FIXED]
        first = measure(traces, model, [*fixed, *tried], 0, losses)
        chosen = {tier: choose(first, tier, CANDIDATES) for tier in ADAPTIVE}
        best = [Side(tier, choose(first, tier, [policy for policy in CANDIDATES if policy.rank is rank]))
                for tier in ADAPTIVE for rank in RANKS.values()]  # fmt: skip
        # Is it the order, or the levels? The fixed tiers in the chosen orders.
        controls = [Side(tier, replace(policy, kept_share=0.0)) for policy in chosen.values() for tier in FIXED]
        second = measure(traces, model, dict.fromkeys([*fixed, *best, *controls]), 1, losses)
    rows = [*means(first), *means(second), *second]
    for each in rows:
        each["chosen"] = each["tier"] in chosen and each["policy"] == told(chosen[each["tier"]])
    write_rows(args.out, [{"benchmark": "precision", **each, **provenance()} for each in rows])
    for tier, policy in chosen.items():
        print(f"{tier}: {told(policy)}")


def level_kl() -> dict[str, float]:
    """Loss of a tier, and of its levels, by name: SmolLM2 behind 1,536 of 2,048 tokens, calibrated as a server does."""
    lines = [line for path in RESULTS.glob("quality-first-start*.jsonl") for line in path.read_text().splitlines()]
    found = {
        row["config"]: row["kl_mean"]
        for row in map(json.loads, lines)
        if (row["model"], row["protocol"], row["calibrated_on"]) == ("smollm2", "continue", "shipped")
        and (row["tokens"], row["first_position"]) == (KL_TOKENS, 0)
    }
    return {tier: found[tier] for tier in FIXED}


def open_trace(source: Source, data: Path, model: Path, folder: Path) -> Trace:
    if source.pattern:
        return Trace(find(data, source.pattern), sessions_at_once=source.sessions_at_once)
    agents.write(source.name, Texts(data, model), folder / f"{source.name}.jsonl")
    return Trace(folder / f"{source.name}.jsonl")


def measure(
    traces: dict[Source, Trace], model: Model, sides: Iterable[Side], half: int, losses: dict[str, float]
) -> list[dict[str, Any]]:
    """Rows of every side at every budget, over one half of each trace; caches that are the same are replayed once."""
    rows = []
    sides = list(sides)
    for source, trace in traces.items():
        wanted = {(budget, side): shape(trace, model, budget, side) for budget in source.budgets for side in sides}
        requests = list(trace)
        middle = len(requests) // 2
        requests = requests[middle:] if half else requests[:middle]
        caches = dict.fromkeys(wanted.values())
        bar = tqdm(caches, f"{source.title}, half {half + 1}", unit="cache", mininterval=5)
        outcomes = {each: replay(requests, [Replay(new_cache(trace, *each))])[0] for each in bar}
        rows += [row(source, half, budget, side, model, outcomes[each], losses)
                 for (budget, side), each in wanted.items()]  # fmt: skip
    return rows


def shape(trace: Trace, model: Model, budget: str, side: Side) -> Shape:
    """What tells caches apart: with one level only the order of eviction matters."""
    pages, page_sizes, *_ = shape_of(parse_budget(budget), parse_tier(side.tier), model, trace.page_tokens)
    return pages, page_sizes, side.policy


def new_cache(trace: Trace, pages: int, page_sizes: tuple[float, ...], policy: Policy) -> Cache:
    return Cache(pages, trace.page_tokens, trace.pages_per_block, page_sizes=page_sizes, policy=policy)


def row(
    source: Source, half: int, budget: str, side: Side, model: Model, outcome: Outcome, losses: dict[str, float]
) -> dict[str, Any]:
    tier = parse_tier(side.tier)
    loss = [losses[name] for name in level_names(tier)]
    hits, begun = outcome.hit_tokens_at, outcome.begun_tokens_at
    both = [found + new for found, new in zip(hits, begun, strict=True)]
    bits = tier.bits(model)
    return {
        "trace": source.name, "half": half + 1, "budget": budget, "tier": side.tier, "policy": told(side.policy),
        "requests": outcome.requests, "prompt_tokens": outcome.prompt_tokens, "hit_rate": outcome.hit_rate,
        "computed_tokens": outcome.computed_tokens, "rejected_requests": outcome.rejected_requests,
        "hit_bits": weighted(hits, bits), "worst_hit_bits": outcome.worst_hit_share * bits[0],
        "hit_kl": weighted(hits, loss), "prompt_kl": weighted(both, loss), "evicted_pages": outcome.evicted_pages,
        "demoted_pages": outcome.demoted_pages, "spared_pages": outcome.spared_pages,
    }  # fmt: skip


def level_names(tier: KvTier) -> Sequence[str]:
    """Of each level the fixed tier that stores everything so."""
    fixed = {LEVELS[name]: name for name in FIXED}
    return [tier.name] if tier.name in FIXED else [fixed[level,] for level in LEVELS[tier.name]]


def weighted(tokens: Sequence[int], values: Sequence[float]) -> float:
    """The mean of values over tokens; of no token: the first."""
    total = sum(tokens)
    return sum(count * value for count, value in zip(tokens, values, strict=True)) / total if total else values[0]


def told(policy: Policy) -> str:
    half_life = "" if policy.rank is recency else f", half-life {policy.half_life_turnovers:g}"
    return f"{policy.rank.__name__}, keeps {policy.kept_share:g}{half_life}"


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each trace, tier and policy over the budgets, which all count alike."""
    same = {}
    for each in rows:
        same.setdefault((each["trace"], each["half"], each["tier"], each["policy"]), []).append(each)
    return [
        dict(zip(("trace", "half", "tier", "policy"), key, strict=True), budget="mean")
        | {name: fmean(each[name] for each in group) for name in ("hit_rate", "hit_bits", "hit_kl", "prompt_kl")}
        for key, group in same.items()
    ]


def choose(rows: Sequence[dict[str, Any]], tier: str, candidates: Sequence[Policy]) -> Policy:
    """The policy that loses least of those that hit at least what `conservative` does, else the one that hits most;
    traces count alike, and so do the budgets of one."""
    found = means(rows)

    def mean(name: str, of_tier: str, policy: Policy) -> float:
        return fmean(each[name] for each in found if (each["tier"], each["policy"]) == (of_tier, told(policy)))

    enough = mean("hit_rate", "conservative", SGLANGS)
    hit_rate = {policy: mean("hit_rate", tier, policy) for policy in candidates}
    if max(hit_rate.values()) < enough:
        return max(hit_rate, key=hit_rate.__getitem__)
    allowed = [policy for policy in candidates if hit_rate[policy] >= enough]
    return min(allowed, key=lambda policy: mean("hit_kl", tier, policy))


if __name__ == "__main__":
    main()
