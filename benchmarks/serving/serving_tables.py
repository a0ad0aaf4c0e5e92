"""The documents' tables of what servers did."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.rows import Row, table


def parity(rows: Sequence[Row]) -> str:
    return table(
        [
            {
                "tier": f"`{row['tier']}`",
                "protocol": row["protocol"],
                "scored tokens": f"{row['scored_tokens']:,}",
                "mean difference, nats": f"{row['mean_difference_nats']:.4f}",
                "top-1 agreement": f"{row['top1_agreement']:.4f}",
                "nats per token (stock)": f"{row['nats_per_token']:.4f} ({row['nats_per_token_stock']:.4f})",
            }
            for row in rows
        ]
    )


def decoded(rows: Sequence[Row]) -> str:
    return table(
        [
            {
                "side": f"`{row['side']}`",
                "decoded tokens": f"{row['decoded_tokens']}",
                "mean difference, nats": f"{row['mean_difference_nats']:.2g}",
                "largest": f"{row['max_difference_nats']:.2g}",
            }
            for row in rows
        ]
    )


def greedy(rows: Sequence[Row]) -> str:
    """Long greedy answers of each server beside stock's."""
    return table(
        [
            {
                "model": row["model"],
                "server": row["side"],
                "same text": f"{row['same']} of {row['answers']}",
                "the others part at token": ", ".join(
                    f"{at + 1}" for at in sorted(row["parted_at_tokens"]) if at < row["asked_tokens"]
                ),
                "repeated": f"{row['repeated_share']:.0%}",
                "ended by themselves": f"{row['ended']}",
                "tokens, mean": f"{row['length_tokens_mean']:,.0f}",
            }
            for row in rows
        ]
    )


def canary(rows: Sequence[Row]) -> str:
    return table(
        [
            {
                "tier": row["side"],
                "answered tokens": f"{row['answered_tokens']:,}",
                "canary, nats": f"{row['canary_kl_mean']:.2g}",
                "offline, nats": f"{row['offline_kl_mean']:.2g}",
                "canary over offline": f"{row['canary_kl_mean'] / row['offline_kl_mean']:.2f}",
                "offline in 21 buckets": f"{row['offline_in_buckets_kl_mean']:.2g}",
                "same top token, canary and offline": f"{row['canary_top1']:.1%}, {row['offline_top1']:.1%}",
                "worst token, nats": f"{row['canary_kl_worst']:.2g}",
            }
            for row in rows
            if row["part"] == "quality"
        ]
    )


def canary_cost(rows: Sequence[Row]) -> str:
    return table(
        [
            {
                "share": f"{row['share']:g}",
                "pair": str(row["pair"] + 1),
                "requests": str(row["requests"]),
                "sampled, run again": f"{row['sampled']}, {row['run_again']}",
                "tokens/s without, with": f"{row['without_tokens_per_s']:.1f}, {row['with_tokens_per_s']:.1f}",
                "with over without": f"{row['ratio']:.3f}",
                "the same by CPU time": f"{row['cpu_ratio']:.3f}",
            }
            for row in rows
            if row["part"] == "throughput"
        ]
    )


def adaptive(rows: Sequence[Row]) -> str:
    """A line for each workload and budget: each tier's prompt tokens computed, KL of its answers, same top token."""
    lines, sides = [], dict.fromkeys(row["side"] for row in rows)
    for share, workload in dict.fromkeys((row["budget_share"], row["workload"]) for row in rows):
        cells = {"requests of": workload, "KV memory": f"{share:g}", **{f"`{side}`": "" for side in sides}}
        for row in rows:
            if (row["budget_share"], row["workload"]) == (share, workload):
                cells[f"`{row['side']}`"] = f"{row['computed_tokens']:,}, {row['kl_mean']:.4f}, {row['top1']:.1%}"
        lines.append(cells)
    return table(lines)


def sharing(rows: Sequence[Row]) -> str:
    return table(
        [
            {
                "prefix shared": f"{row['prefix_share']:.0%}",
                "times less than fp16, nothing shared": f"{row['times_unshared_fp16']:.1f}",
                "published": f"{row['published_times']:g}",
                "times less than fp16 in stock's tree": f"{row['times_shared_fp16']:.2f}",
            }
            for row in rows
            if row["benchmark"] == "sharing"
        ]
    )


def speculation(rows: Sequence[Row]) -> str:
    """Tokens a second with drafts and without, by tier and kind of text."""
    return table(
        [
            {
                "tier": f"`{row['tier']}`",
                "prompts": f"{row['prompts']} {row['kind']}",
                "tokens/s": f"{row['tokens_per_s']:.1f}",
                "drafts": row.get("algorithm", ""),
                "with them": f"{row['drafted_tokens_per_s']:.1f} ({row['times']:.2f}x)" if "times" in row else "",
                "tokens a step": f"{row['accepted_per_step']:.2f}" if "times" in row else "",
                "the same text": f"{row['same_texts']} of {row['prompts']}" if "times" in row else "",
                "four at once": f"{row['same_texts_at_once']} of {row['prompts']}",
            }
            for row in rows
        ]
    )


def harness(rows: Sequence[Row]) -> str:
    """What lm-evaluation-harness says of each server, and how far its answers are from stock's."""
    return table(
        [
            {
                "server": f"`{row['side']}`" + (", calibrated" if row["calibration"] not in ("", "none") else ""),
                "questions": str(row["items"]),
                "acc": f"{row['acc']:.3f} ± {row['acc_stderr']:.3f}",
                "acc_norm": f"{row['acc_norm']:.3f} ± {row['acc_norm_stderr']:.3f}",
                "same answer as stock": f"{row['acc_as_stock']:.0%}, {row['acc_norm_as_stock']:.0%}",
                "off stock, mean of a choice": f"{row['mean_difference_nats']:.2f} nats",
            }
            for row in rows
        ]
    )
