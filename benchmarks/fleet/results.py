"""What a larger resident KV cache is worth on published traces: JSON, plots, Markdown, and the replay's own speed.

    python -m benchmarks.fleet.results --data FOLDER       with mooncake/, claude_code_traces/, azure_llm_2023/

Hit rates are of requests one after another: they depend on the trace and the cache alone. Times and GPUs need rates;
`RATES` below are round assumptions, none was measured by us, and the tables say so.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT, provenance
from sglang_deltastore.fleet.claims import check_claims
from sglang_deltastore.fleet.kv import KvTier, parse_tier
from sglang_deltastore.fleet.page_pool import Cache
from sglang_deltastore.fleet.pictures import hit_rate_against_budget
from sglang_deltastore.fleet.replay import Costs, Replay
from sglang_deltastore.fleet.replay_command import hit_rates, report
from sglang_deltastore.fleet.study import Study, parse_budget, study
from sglang_deltastore.fleet.tables import Gpu, Model, read_table
from sglang_deltastore.fleet.traces import Trace

BUDGETS = ("1M", "2M", "4M", "8M", "16M", "32M")
TIERS = ("fp16", "fp8", "K4V4-class=4", "conservative", "balanced=10.2")
MODEL, GPU, GROUP_GPUS, RESERVE_SHARE = "Llama-3-70B", "H100-80", 4, 0.12

#: Of a group of 4 H100 with a 70B model. Prefill: 141 GFLOP a token, 4 x 989 TFLOP/s of dense bf16, 40% reached, is
#: 11,200 tokens/s. Answers: two rounds of thumb for such a group in a full batch.
RATES = Costs(prefill_tokens_per_s=11_000, decode_tokens_per_s=1_500, stream_tokens_per_s=30)
TTFT_TARGET_S = 5.0
SPEED_TOKENS = 4_000_000


@dataclass(frozen=True)
class Source:
    """One trace file."""

    name: str
    title: str
    path: str
    sessions_at_once: int = 16


SOURCES = (
    Source("mooncake-conversation", "Mooncake conversation", "mooncake/conversation_trace*.jsonl*"),
    Source("mooncake-synthetic", "Mooncake synthetic", "mooncake/synthetic_trace*.jsonl*"),
    Source("claude-code", "Claude Code, 64 sessions at once", "claude_code_traces/sessions.jsonl*", 64),
    Source("azure-conversation", "Azure 2023 conversation", "azure_llm_2023/conv*.csv*"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", metavar="FOLDER")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, gpu = read_table(Model, "models.toml")[MODEL], read_table(Gpu, "gpus.toml")[GPU]
    group_gb = (GROUP_GPUS * gpu.memory_bytes * (1 - RESERVE_SHARE) - model.weights_bytes) / 1e9
    tiers, traces = [parse_tier(text) for text in TIERS], []
    for source in SOURCES:
        path = find(args.data, source.path)
        print(f"{source.title}: {path.name}", flush=True)
        trace = Trace(path, sessions_at_once=source.sessions_at_once)
        traces.append(measure(source, trace, model, tiers, group_gb, args.out))
    result = {
        **provenance(),
        "group": {"model": MODEL, "gpu": GPU, "gpus": GROUP_GPUS, "kv_gb": group_gb, "rates": asdict(RATES)},
        "ttft_target_s": TTFT_TARGET_S,
        "traces": traces,
        "claims": [asdict(row) for row in check_claims()],
    }
    (args.out / "fleet.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "fleet.md").write_text(markdown(result))
    print(f"wrote fleet.json, fleet.md and fleet-*.svg in {args.out}")


def find(folder: Path, pattern: str) -> Path:
    """The one file that matches."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder / pattern}: {len(found)} files match, one is wanted")
    return found[0]


def measure(
    source: Source, trace: Trace, model: Model, tiers: list[KvTier], group_gb: float, out: Path
) -> dict[str, Any]:
    """Hits by budget and tier; for timed traces the groups needed; the replay's speed."""
    budgets = [parse_budget(text) for text in BUDGETS]
    hits = study(trace, model, budgets, tiers)
    row = {
        "name": source.name,
        "title": source.title,
        "speed": speed(trace),
        "hits": without_samples(trace, model, hits),
    }
    if hits.endless.hit_tokens:
        lines = hit_rates(hits, {budget.text: budget.bytes(model) for budget in budgets}, model)
        hit_rate_against_budget(source.title, lines, out / f"fleet-{source.name}.svg")
    group = study(trace, model, [parse_budget(f"{group_gb:.1f}GB")], tiers, RATES, TTFT_TARGET_S,
                  budget_per_worker=True)  # fmt: skip
    row["groups_needed"] = {found.tier: found.workers_needed for found in group.rows}
    most = max(filter(None, row["groups_needed"].values()), default=1)
    at_most = study(trace, model, [parse_budget(f"{group_gb:.1f}GB")], tiers,
                    Costs(**{**asdict(RATES), "workers": most}), budget_per_worker=True)  # fmt: skip
    row["at_groups"] = most
    row["timed"] = without_samples(trace, model, at_most)["rows"]
    return row


def without_samples(trace: Trace, model: Model, found: Study) -> dict[str, Any]:
    """The report; of the pages over time only those of the first tier and the endless cache are kept."""
    whole = report(trace, model, found, None, None)
    for row in whole["rows"]:
        row["resident"] = [] if row["tier"] != "fp16" else row["resident"][::8]
    whole["endless"]["resident"] = whole["endless"]["resident"][::8]
    return whole


def speed(trace: Trace) -> dict[str, float]:
    """Block references a second of processor time on one core, reading and replaying apart; the best of three."""
    reading, replaying, references = [], [], 0
    for _ in range(3):
        began = time.process_time()
        references = sum(len(request.blocks) // 8 for request in trace)
        reading.append(time.process_time() - began)
        each = Replay(Cache(SPEED_TOKENS // trace.page_tokens, trace.page_tokens, trace.pages_per_block))
        began = time.process_time()
        for request in trace:
            each.arrive(request)
        replaying.append(time.process_time() - began)
    whole, read = min(replaying), min(reading)
    return {
        "block_references": references,
        "cache_tokens": SPEED_TOKENS,
        "read_references_per_s": references / read,
        "replay_references_per_s": references / max(whole - read, 1e-9),
        "both_references_per_s": references / whole,
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables of fleet.md."""
    head = f"{result['machine']}, {result['cores']} cores, commit {result['commit']}, {result['date']}"
    parts = [f"<!-- made by make results-fleet; do not edit -->\n{head}.\n"]
    for trace in result["traces"]:
        parts.append(hits_table(trace))
    parts += [groups_table(result), speed_table(result), claims_table(result)]
    return "\n".join(parts)


def hits_table(trace: dict[str, Any]) -> str:
    hits, endless, sharing = trace["hits"], trace["hits"]["endless"], trace["hits"]["sharing"]
    computed_m = (endless["prompt_tokens"] - endless["hit_tokens"]) / 1e6
    title = (
        f"### {trace['title']}\n\n`{hits['trace']}`: {endless['requests']:,} requests, "
        f"{endless['prompt_tokens'] / 1e6:,.1f} M prompt tokens. An endless cache hits {endless['hit_rate']:.1%} and "
        f"computes {computed_m:,.1f} M (factor {endless['prompt_tokens'] / 1e6 / computed_m:.2f}). Of whole blocks "
        f"{sharing['factor']:.2f} = {sharing['temporal']:.2f} (turns repeat their past) x {sharing['across']:.2f} "
        "(conversations and branches share).\n"
    )
    if not endless["hit_tokens"]:
        return title + "\nNothing in this trace says what prompts share: no cache of any size hits.\n"
    tiers = list(dict.fromkeys(row["tier"] for row in hits["rows"]))
    cell = {(row["budget"], row["tier"]): f"{row['hit_rate']:.1%} ({row['computed_tokens'] / 1e6:,.1f} M)"
            for row in hits["rows"]}  # fmt: skip
    lines = [f"| {budget} | " + " | ".join(cell[budget, tier] for tier in tiers) + " |" for budget in BUDGETS]
    return table(title, ["KV memory, fp16 tokens", *tiers], lines)


def groups_table(result: dict[str, Any]) -> str:
    group = result["group"]
    tiers = list(result["traces"][0]["groups_needed"])
    title = (
        f"### Groups of {group['gpus']} {group['gpu']} for {group['model']}, nine in ten first tokens within "
        f"{result['ttft_target_s']:g} s\n\nEach group brings {group['kv_gb']:.0f} GB for KV. Rates of a group are "
        f"assumed, not measured: {group['rates']['prefill_tokens_per_s']:,} prompt tokens/s, "
        f"{group['rates']['decode_tokens_per_s']:,} answer tokens/s in all. In brackets the wait with as "
        "many groups as the neediest tier takes, median / 90th percentile. Requests come when the trace says, whether "
        "or not the answer before them was ready; for coding agents that is stricter than life.\n"
    )
    lines = []
    for trace in result["traces"]:
        waits = {row["tier"]: f"{wait(row['ttft_p50_s'])} / {wait(row['ttft_p90_s'])} s" for row in trace["timed"]}
        cells = (f"{trace['groups_needed'][tier]} ({waits[tier]})" for tier in tiers)
        lines.append(f"| {trace['title']} ({trace['at_groups']}) | " + " | ".join(cells) + " |")
    return table(title, ["trace", *tiers], lines)


def wait(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f}"


def speed_table(result: dict[str, Any]) -> str:
    title = (
        "### Speed of the replay\n\nMillions of block references a second of processor time, one core, a cache of "
        f"{SPEED_TOKENS / 1e6:g} M tokens, best of three.\n"
    )
    lines = []
    for trace in result["traces"]:
        rates = (trace["speed"][f"{what}_references_per_s"] / 1e6 for what in ("read", "replay", "both"))
        count = trace["speed"]["block_references"]
        lines.append(f"| {trace['title']} | {count:,} | " + " | ".join(f"{rate:.2f}" for rate in rates) + " |")
    return table(title, ["trace", "block references", "reading", "replaying", "both"], lines)


def claims_table(result: dict[str, Any]) -> str:
    lines = [
        f"| {row['scenario']}: {row['quantity']} | {figure(row['claimed'])} | {figure(row['derived'])} | "
        f"{row['verdict']} | {row['why']} |"
        for row in result["claims"]
    ]
    title = "### Published fleet figures, and what follows from their own inputs\n"
    return table(title, ["figure", "claimed", "derived", "verdict", "why"], lines)


def figure(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or value >= 1000 else f"{value:.1f}"


def table(title: str, columns: list[str], lines: list[str]) -> str:
    head = "| " + " | ".join(columns) + " |"
    return "\n".join([title, head, "|---" * len(columns) + "|", *lines, ""])


if __name__ == "__main__":
    main()
