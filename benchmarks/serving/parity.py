"""Log-probabilities of every tier against stock SGLang, on the same prompts, in one run.

Two protocols, both teacher-forced:
    cold  the prompt is computed in chunks; every chunk reads the earlier ones from the store
    hit   the first half is cached by an earlier request; the second half is computed behind it, for
          prompts of up to 512 tokens once more, which must give the very same numbers

A wrong page, head, offset or mask reads noise instead of the context: log-probabilities then move by
nats and half of the top tokens change. The bounds below are far under that, and far over what the
codec costs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.provenance import provenance, write_rows
from benchmarks.serving.sides import names_among
from sglang_deltastore.host.models import MODELS, model_path
from sglang_deltastore.host.server_process import Server, serve
from sglang_deltastore.policy.tiers import TIERS

CHUNK_TOKENS = 256
CAPACITY_TOKENS = 8192
REPEATED_TOKENS = 512
AT_ONCE = 4
COMMON_ARGUMENTS = (
    "--device", "cpu", "--dtype", "float32", "--page-size", "16", "--max-running-requests", str(AT_ONCE),
    "--max-total-tokens", str(CAPACITY_TOKENS), "--sleep-on-idle",
)  # fmt: skip
#: stock computes each prompt in one piece: the same numbers, sooner
STOCK_ARGUMENTS = ("--attention-backend", "torch_native")
OUR_ARGUMENTS = ("--kv-compress", "deltastore", "--chunked-prefill-size", str(CHUNK_TOKENS), "--kv-compress-tier")


@dataclass(frozen=True)
class Bound:
    """What a tier may differ from stock SGLang, mean over all tokens of a protocol, on a model of
    135M parameters (the smaller the model, the more it feels)."""

    mean_difference_nats: float
    top1_agreement: float


#: raw pages round to float16, 11 bits: nothing but noise of the last digits. The packed tiers:
#: about twice what was measured, a tenth of what one wrong page costs. k2v2: more than twice, since only a short text
#: was measured (0.32 nats, 0.825)
BOUNDS = {
    "raw": Bound(0.001, 0.999),
    "lossless": Bound(0.18, 0.90),
    "k4v2": Bound(0.30, 0.82),
    "conservative": Bound(0.36, 0.80),
    "k2v2": Bound(0.80, 0.62),
}


@dataclass(frozen=True)
class Scored:
    """Of each scored token: its log-probability in nats, and the most likely token at its place."""

    logprobs: list[float]
    top_ids: list[int]


def main() -> int:
    arguments = _parser().parse_args()
    prompts = _prompts(arguments)
    console = Console(stderr=True)
    stock = _score_server(arguments.model, prompts, STOCK_ARGUMENTS, "stock")
    rows, failures = [], []
    for tier in arguments.tiers:
        ours = ("--kv-compress-calibration", arguments.calibration, *OUR_ARGUMENTS, tier)
        scored = _score_server(arguments.model, prompts, ours, tier)
        for protocol in ("cold", "hit"):
            row = _row(tier, protocol, stock[protocol], scored[protocol], prompts)
            row["calibrated"] = arguments.calibration != "none"
            rows.append({**row, "model": Path(arguments.model).name, **provenance()})
            failures += _failures(row)
        if scored["hit, short"] != scored["hit again, short"]:
            failures.append(f"{tier}: the same prompt behind the same cached pages gave other numbers")
        if arguments.json:
            write_rows(arguments.json, rows)  # after each tier: the whole run takes half an hour
    failures += _order_failures(rows)
    _print(console, rows)
    for failure in failures:
        console.print(f"[red]{failure}[/red]")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.parity", description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="plain text to take the prompts from")
    parser.add_argument(
        "--model", default="smollm2", help="Hugging Face folder, or an embedded model's name (default: %(default)s)"
    )
    parser.add_argument(
        "--tiers", type=names_among(TIERS), default=",".join(TIERS), help="comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration", default="none", metavar="FILE|none|auto", help="as --kv-compress-calibration (default: none)"
    )
    parser.add_argument("--prompts", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=4096, help="tokens of the longest (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="4 prompts of up to 640 tokens")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON row a line")
    return parser


def _prompts(arguments: argparse.Namespace) -> list[list[int]]:
    """Token ids of prompts of rising length, one after the other from the text."""
    if arguments.model in MODELS:
        arguments.model = str(model_path(arguments.model))
    if arguments.quick:
        arguments.prompts, arguments.longest = 4, 640
    token_ids = AutoTokenizer.from_pretrained(arguments.model)(arguments.text.read_text())["input_ids"]
    # Squares: many short prompts, a few long ones, as in chat.
    lengths = [max(arguments.longest * (i + 1) ** 2 // arguments.prompts**2 - 1, 33) for i in range(arguments.prompts)]
    if sum(lengths) > len(token_ids):
        raise SystemExit(f"--text {arguments.text}: {len(token_ids)} tokens; {sum(lengths)} are needed for the prompts")
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [token_ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def _score_server(model: str, prompts: list[list[int]], arguments: tuple[str, ...], label: str) -> dict[str, Scored]:
    """All prompts through one server, by every protocol."""
    scored: dict[str, list[Scored]] = {"cold": [], "hit": [], "hit, short": [], "hit again, short": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(model, (*COMMON_ARGUMENTS, *arguments), log_path=Path(folder) / "server.log") as server,
    ):
        for prompt in tqdm(prompts, desc=label, unit="prompt"):
            half = len(prompt) // 2
            flush(server)
            scored["cold"].append(score(server, prompt, from_token=1))
            flush(server)
            score(server, prompt[:half], from_token=half - 1)  # caches the first half
            scored["hit"].append(score(server, prompt, from_token=half))
            if len(prompt) <= REPEATED_TOKENS:
                # The second half is cached by now too, but a request that wants log-probabilities
                # from `half` on is matched no further.
                scored["hit, short"].append(scored["hit"][-1])
                scored["hit again, short"].append(score(server, prompt, from_token=half))
    return {protocol: _join(parts) for protocol, parts in scored.items()}


def flush(server: Server) -> None:
    requests.post(server.url + "/flush_cache", timeout=60).raise_for_status()


def score(server: Server, prompt: list[int], from_token: int) -> Scored:
    """Log-probabilities of prompt[from_token:], each given all tokens before it."""
    response = requests.post(
        server.url + "/generate",
        json={
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": from_token - 1,
            "top_logprobs_num": 1,
        },
        timeout=600,
    )
    response.raise_for_status()
    meta = response.json()["meta_info"]
    # The first entry is the token at logprob_start_len itself, which has no log-probability.
    tokens, tops = meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:]
    assert [entry[1] for entry in tokens] == prompt[from_token:], "the server scored other tokens than asked for"
    return Scored([entry[0] for entry in tokens], [entry[0][1] for entry in tops])


def _join(parts: list[Scored]) -> Scored:
    return Scored([x for part in parts for x in part.logprobs], [x for part in parts for x in part.top_ids])


def _row(tier: str, protocol: str, stock: Scored, ours: Scored, prompts: list[list[int]]) -> dict[str, Any]:
    differences = [abs(a - b) for a, b in zip(stock.logprobs, ours.logprobs, strict=True)]
    agreeing = [a == b for a, b in zip(stock.top_ids, ours.top_ids, strict=True)]
    return {
        "benchmark": "parity",
        "tier": tier,
        "protocol": protocol,
        "prompts": len(prompts),
        "longest_tokens": max(map(len, prompts)),
        "scored_tokens": len(differences),
        "mean_difference_nats": statistics.fmean(differences),
        "max_difference_nats": max(differences),
        "top1_agreement": statistics.fmean(agreeing),
        "nats_per_token_stock": -statistics.fmean(stock.logprobs),
        "nats_per_token": -statistics.fmean(ours.logprobs),
    }


def _failures(row: dict[str, Any]) -> list[str]:
    bound = BOUNDS[row["tier"]]
    label = f"{row['tier']}, {row['protocol']}"
    failures = []
    # `not <=` rather than `>`: a NaN must fail.
    if not row["mean_difference_nats"] <= bound.mean_difference_nats:
        failures.append(f"{label}: mean difference {row['mean_difference_nats']} > {bound.mean_difference_nats} nats")
    if not row["top1_agreement"] >= bound.top1_agreement:
        failures.append(f"{label}: top-1 agreement {row['top1_agreement']} < {bound.top1_agreement}")
    return failures


def _order_failures(rows: list[dict[str, Any]]) -> list[str]:
    """More bits must be closer: raw < lossless < k4v2 < conservative < k2v2."""
    failures = []
    for protocol in ("cold", "hit"):
        by_tier = {row["tier"]: row["mean_difference_nats"] for row in rows if row["protocol"] == protocol}
        means = [by_tier[tier] for tier in TIERS if tier in by_tier]
        if means != sorted(means):
            failures.append(f"{protocol}: tiers with more bits are not closer to stock: {by_tier}")
    return failures


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="Log-probabilities against stock SGLang")
    for name in ("tier", "protocol", "tokens", "mean |difference|, nats", "max", "top-1 agreement", "nats/token"):
        table.add_column(name, justify="left" if name in ("tier", "protocol") else "right")
    for row in rows:
        table.add_row(
            row["tier"], row["protocol"], f"{row['scored_tokens']:,}", f"{row['mean_difference_nats']:.4f}",
            f"{row['max_difference_nats']:.2f}", f"{row['top1_agreement']:.4f}",
            f"{row['nats_per_token']:.4f} ({row['nats_per_token_stock']:.4f})",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
