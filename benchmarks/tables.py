"""The documents' tables, each from one file in benchmarks/results. What several tables of a kind are made of is in
quality_tables, serving_tables, fleet_tables and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

from benchmarks.fleet.fleet_tables import (
    fleet,
    hit_curve,
    hit_curve_cost,
    hit_curve_served,
    precision,
    precision_policies,
)
from benchmarks.provenance import RESULTS
from benchmarks.quality_tables import WIKITEXT, first_start, long_context, long_context_by, quality, sunk, transfer
from benchmarks.rows import Row, nats, of_rows, origin, rows_of, table
from benchmarks.serving import report
from benchmarks.serving.serving_tables import (
    adaptive,
    canary,
    canary_cost,
    decoded,
    greedy,
    harness,
    parity,
    sharing,
    speculation,
)
from deltastore_kernels.layout import PageLayout
from sglang_deltastore.policy.tiers import DEFAULT_TIER, SERVED_TIERS, TIERS, Tier


def tiers() -> str:
    """Bytes and ratios of pages of 16 tokens, from their layouts; SmolLM2-135M has 30 layers with 3 KV heads of 64."""
    lines = []
    for name, served in SERVED_TIERS.items():
        levels = [TIERS[level] for level in served.levels or (name,)]
        narrow, wide = (
            [level.layouts([heads], head_dim, page_tokens=16)[0] for level in levels]
            for heads, head_dim in ((3, 64), (8, 128))
        )
        lines.append(
            {
                "`--kv-compress-tier`": f"`{name}`" + (" (default)" if name == DEFAULT_TIER else ""),
                "keys, values": f"of `{'`, then of `'.join(served.levels)}`" if served.levels else _sides(served),
                "bytes per token, SmolLM2-135M": _range(f"{30 * layout.page_bytes // 16:,}" for layout in narrow),
                "against fp16, head_dim 64": _range(_ratio(layout) for layout in narrow),
                "head_dim 128": _range(_ratio(layout) for layout in wide),
            }
        )
    return table(lines)


def _range(values: Iterable[str]) -> str:
    return " to ".join(values)


def _ratio(layout: PageLayout) -> str:
    return f"{layout.raw_page_bytes / layout.page_bytes:.2f}x"


def _sides(of: Tier) -> str:
    if of.format.is_raw:
        return "16-bit floats"
    plain, *calibrated = (
        f"{each.key_bits} bits, {each.value_bits} bits" for each in (of.format, of.calibrated) if each
    )
    return f"{calibrated[0]}; without calibration {plain}" if calibrated else plain


def figures() -> str:
    """What the README shows of all results, a command and a machine beside each."""
    return table([_memory(), _hits(), _first_token(), _per_token(), *_losses()])


def _figure(what: str, stock: str, ours: str, command: str, rows: Sequence[Row]) -> dict[str, str]:
    return {
        "figure": what,
        "stock, fp16": stock,
        "DeltaStore": ours,
        "command": f"`{command}`",
        "machine, commit": origin(rows),
    }


def _memory() -> dict[str, str]:
    row = next(row for row in rows_of("sharing") if row.get("prefix_share") == 0.75)
    return _figure(
        f"memory: KV of {row['users']} users whose prompts share {row['prefix_share']:.0%}, MB",
        f"{row['fp16_shared_bytes'] / 1e6:.1f} ({row['fp16_unshared_bytes'] / 1e6:.1f} without its tree)",
        f"`{row['tier']}`: {row['stored_bytes'] / 1e6:.1f} ({row['times_shared_fp16']:.1f}x, "
        f"{row['times_unshared_fp16']:.1f}x)",
        "make results-sharing DATA=folder",
        [row],
    )


def _hits() -> dict[str, str]:
    result = json.loads((RESULTS / "fleet.json").read_text())
    trace = next(trace for trace in result["traces"] if trace["name"] == "claude-code")
    found = {row["tier"]: row["hit_rate"] for row in trace["hits"]["rows"] if row["budget"] == "1M"}
    return _figure(
        "memory: prompt tokens found in the cache, Claude Code trace, room for 1M fp16 tokens",
        f"{found['fp16']:.1%}",
        f"`conservative`: {found['conservative']:.1%}",
        "make results-fleet DATA=folder",
        [result],
    )


def _first_token() -> dict[str, str]:
    rows = [row for row in rows_of("serving") if row["workload"] == "airline"]
    seconds = {row["side"]: row["ttft_p50_ms"] / 1000 for row in rows}
    return _figure(
        "speed: median time to first token, recorded agent, same bytes for KV on both sides, s",
        f"{seconds['stock']:.2f}",
        f"`k4v2`: {seconds['k4v2']:.2f} ({seconds['stock'] / seconds['k4v2']:.1f}x)",
        "make results-serving DATA=folder",
        rows,
    )


def _per_token() -> dict[str, str]:
    """The shortest and the longest context: where ours is slower, and where it gains most."""
    rows = [row for row in rows_of("latency") if row["metric"] == "time per output token"]
    ms = {(row["context_tokens"], row["side"]): row["median"] for row in rows}
    contexts = sorted({context for context, _ in ms})
    ends = (contexts[0], contexts[-1])
    ours = "; ".join(f"{ms[end, 'k4v2']:.0f} ({ms[end, 'stock'] / ms[end, 'k4v2']:.2f}x)" for end in ends)
    return _figure(
        f"speed: time per output token behind {ends[0]:,}; {ends[1]:,} tokens, ms",
        "; ".join(f"{ms[end, 'stock']:.0f}" for end in ends),
        f"`k4v2`: {ours}",
        'make bench-latency ARGS="--rounds 1"',
        rows,
    )


def _losses() -> list[dict[str, str]]:
    wanted = ("smollm2", WIKITEXT, 2048)
    rows = [row for row in rows_of("quality-first-start") if (row["model"], row["text"], row["tokens"]) == wanted]
    found = {(row["config"], row["calibrated_on"]): row for row in rows}
    return [
        _figure(
            f"quality: KL in nats behind 1,536 cached of 2,048 tokens, and the same top token, `{name}`",
            "0, 100%",
            f"{found[name, 'shipped']['kl_mean']:.4f}, {found[name, 'shipped']['top1']:.1%} "
            f"(not calibrated {found[name, 'none']['kl_mean']:.4f}, {found[name, 'none']['top1']:.1%})",
            "make results-first-start TEXT=file OTHERS=files",
            rows,
        )
        for name in ("lossless", "k4v2")
    ]


def scale_steps(rows: Sequence[Row]) -> str:
    sides = list(dict.fromkeys(row["side"] for row in rows))
    told = {"decode_host": "a decode step through 80 layers", "sinks_exhausted": "a sequence that finds no sink free"}
    found = {(row["what"], row["side"]): row for row in rows}
    return table(
        [
            {"what": f"{text}, ms"} | {side: f"{found[what, side]['median']:.1f}" for side in sides}
            for what, text in told.items()
        ]
    )


def seam(rows: Sequence[Row]) -> str:
    """What other versions of SGLang have of what we take hold of in the tested one."""
    return table(
        [
            {
                "SGLang": row["version"],
                "the same": f"{row['same']}",
                "other code": f"{len(row['other code'])}",
                "another signature": f"{len(row['other signature'])}",
                "not there": f"{len(row['gone'])}",
                f"options that {row['against']} lacks": f"{len(row['options added'])}",
            }
            for row in rows
        ]
    )


def gpu() -> str:
    """Decode at head_dim 128 on sm_90: what the machine code says."""
    rows = [json.loads(line) for line in (RESULTS / "gpu-static.json").read_text().splitlines()]
    return table(
        [
            {
                "kernel": row["kernel"].removesuffix(" attend_decode"),
                "format": row["format"],
                "warp instructions": f"{row['instructions']:.1f}",
                "registers": f"{row['registers']}",
                "spilling instructions": f"{row['local_instructions']}",
                "blocks for each SM": f"{row['occupancy_blocks']}",
                "best time by roofline, us": f"{row['roofline']['us']:.0f}",
                "against reading bf16": f"{row['bf16_us'] / row['roofline']['us']:.1f}x",
            }
            for row in rows
            if row["kernel"].endswith(" attend_decode")
            and (row["arch"], row["head_dim"]) == ("sm_90", 128)
            and row["format"] in ("K4V3", "K4V2", "K3V2")
        ]
    )


def gpu_step(rows: Sequence[Row]) -> str:
    """Times better than stock bf16, and fp8, of a decode step: calculated."""
    cells = {(row["model"], row["batch"], row["context_tokens"]): row for row in rows if row["format"] == "K4V3"}
    contexts = sorted({context for *_, context in cells})
    return table(
        [
            {"one GPU's share of": model, "batch": f"{batch}", "kernels a layer": f"{row['kernels_a_layer']}"}
            | {f"{context:,} tokens": _against_stock(cells[model, batch, context]) for context in contexts}
            for (model, batch, context), row in cells.items()
            if context == contexts[0]
        ]
    )


def _against_stock(row: Row) -> str:
    return f"{row['us'] / 1e3:.1f} ms: {row['x_of_bf16']:.2f}x bf16, {row['x_of_fp8']:.2f}x fp8"


def models_served(rows: Sequence[Row]) -> str:
    """Mean |differences| of log-probabilities by family."""
    return table(
        [
            _family(row)
            | {
                "judge": row["judge"] + (", medians" if row["average"] == "median" else ""),
                "`raw` cold, hit, decode": nats(row, "raw_cold", "raw_hit", "raw_decode"),
                "`lossless` cold, hit": nats(row, "lossless_cold", "lossless_hit"),
                "another context": nats(row, "another_context"),
            }
            for row in rows
            if row["state"] == "served"
        ]
    )


def models_not_served(state: str) -> Callable[[Sequence[Row]], str]:
    """Families in a state with what was said of them."""
    return lambda rows: table(
        [
            _family(row) | {"message": row["message"].replace("`", "'").replace("|", "\\|")}
            for row in rows
            if row["state"] == state
        ]
    )


def _family(row: Row) -> dict[str, str]:
    return {
        "family": row["like"],
        "attention": row["attention"],
        "heads": f"{row['query_heads']}/{row['kv_heads']} x {row['head_dim']}",
    }


TABLES: dict[str, Callable[[], str]] = {
    "tiers": tiers,
    "figures": figures,
    "quality": of_rows("quality-smollm2", quality),
    "first-start": of_rows("quality-first-start", first_start),
    "transfer": of_rows("quality-transfer", transfer),
    "sunk": of_rows("quality-sunk", sunk),
    "long-context": of_rows("long-context", long_context),
    "long-position": of_rows("long-context", long_context_by("kl_by_position", "tokens before it, up to")),
    "long-distance": of_rows("long-context", long_context_by("kl_by_distance", "read raw, up to")),
    "greedy": of_rows("greedy", greedy),
    "decoded": of_rows("decoded", decoded),
    "adaptive": of_rows("adaptive", adaptive),
    "canary": of_rows("canary", canary),
    "canary-cost": of_rows("canary", canary_cost),
    "parity": of_rows("parity", parity),
    "latency": of_rows("latency", report.latency),
    "latency-against-251daaa": of_rows("latency-against-251daaa", report.latency),
    "latency-polled": of_rows("latency-polled", report.latency),
    "serving": of_rows("serving", report.summary),
    "serving-budgets": of_rows("serving-budgets", report.budgets),
    "speculation": of_rows("speculation", speculation),
    "harness": of_rows("harness", harness),
    "sharing": of_rows("sharing", sharing),
    "fleet": fleet,
    "hit-curve": of_rows("hit-curve", hit_curve),
    "hit-curve-cost": of_rows("hit-curve", hit_curve_cost),
    "hit-curve-served": of_rows("hit-curve-served", hit_curve_served),
    "precision": of_rows("precision", precision),
    "precision-policies": of_rows("precision", precision_policies),
    "models-served": of_rows("models", models_served),
    "models-gpu-only": of_rows("models", models_not_served("gpu only")),
    "models-refused": of_rows("models", models_not_served("refused")),
    "models-not-here": of_rows("models", models_not_served("not here")),
    "scale-steps": of_rows("scale-steps", scale_steps),
    "seam": of_rows("seam", seam),
    "gpu": gpu,
    "gpu-step": of_rows("gpu-step", gpu_step),
}
"""Name -> what makes the table."""
