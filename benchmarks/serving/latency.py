"""Latency of one request against stock SGLang: time per output token by context, time to first token cold and on a hit.

Three servers side by side, asked in turn, round by round, because a machine's speed drifts: stock SGLang, DeltaStore
with raw pages (what its attention path brings) and DeltaStore compressed (what compression brings beyond that). Every
answer's length and cached tokens are checked; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.provenance import provenance, write_rows
from sglang_deltastore.cpu_host import model_path
from sglang_deltastore.server_process import Server, serve
from sglang_deltastore.tiers import DEFAULT_TIER, TIERS

PAGE_TOKENS = 16
ANSWER_TOKENS = 16
NEW_TOKENS = 32
"""Tokens of the prompt that a hit leaves to compute."""
FIRST_WORD, LAST_WORD = 1000, 12000
"""Token ids to draw prompts from: plain words in the embedded models' vocabularies."""
TIMEOUT_S = 900


def main() -> int:
    arguments = _parser().parse_args()
    model = arguments.model or str(model_path())
    contexts = [64, 2048] if arguments.quick else arguments.contexts
    rounds = 2 if arguments.quick else arguments.rounds
    console = Console(stderr=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = {
            name: stack.enter_context(serve(model, _arguments(contexts, own), log_path=folder / f"{name}.log"))
            for name, own in _sides(arguments.tier).items()
        }
        samples = _measure(sides, contexts, rounds)
    rows = [
        {
            "benchmark": "latency",
            "side": side,
            "context_tokens": context,
            "metric": metric,
            "median_ms": statistics.median(values),
            "least_ms": min(values),
            "rounds": rounds,
            "model": Path(model).name,
            **provenance(),
        }
        for (side, context, metric), values in samples.items()
    ]
    if arguments.json:
        write_rows(arguments.json, rows)
    _print(console, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.latency", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="Hugging Face folder (default: the embedded SmolLM2)")
    parser.add_argument(
        "--tier", default="k4v2", choices=TIERS, help=f"default: %(default)s; a server's: {DEFAULT_TIER}"
    )
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[64, 4096, 7936], help="tokens (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="contexts 64 and 2048, two rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON row a line")
    return parser


def _sides(tier: str) -> dict[str, tuple[str, ...]]:
    ours = ("--kv-compress", "deltastore", "--kv-compress-calibration", "none", "--kv-compress-tier")
    return {"stock": ("--attention-backend", "torch_native"), "raw": (*ours, "raw"), tier: (*ours, tier)}


def _arguments(contexts: list[int], own: tuple[str, ...]) -> tuple[str, ...]:
    room = 2 * (max(contexts) + NEW_TOKENS + ANSWER_TOKENS)
    tokens = -(-room // PAGE_TOKENS) * PAGE_TOKENS
    common = (
        "--device", "cpu", "--dtype", "float32", "--page-size", str(PAGE_TOKENS), "--max-running-requests", "4",
        "--max-total-tokens", str(tokens), "--sleep-on-idle",
    )  # fmt: skip
    return (*common, *own)


def _measure(sides: dict[str, Server], contexts: list[int], rounds: int) -> dict[tuple[str, int, str], list[float]]:
    """Milliseconds of every (side, context, metric), a value for each round after an unmeasured one."""
    samples: dict[tuple[str, int, str], list[float]] = {}
    words = random.Random(0)
    with tqdm(total=(1 + rounds * len(contexts)) * len(sides), unit="case", file=sys.stderr) as bar:
        for measured in range(rounds + 1):
            for context in contexts if measured else contexts[:1]:
                prompt = [words.randrange(FIRST_WORD, LAST_WORD) for _ in range(context)]
                for side, server in sides.items():
                    bar.set_description(f"{side}, {context}")
                    found = _case(server, prompt)
                    bar.update()
                    for metric, value in found.items() if measured else ():
                        samples.setdefault((side, context, metric), []).append(value)
    return samples


def _case(server: Server, prompt: list[int]) -> dict[str, float]:
    """One prompt, cold, then behind its own cached pages."""
    requests.post(server.url + "/flush_cache?timeout=60", timeout=90).raise_for_status()
    whole_pages = (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS
    cold_ms = _ask(server, prompt, 1, cached=0)
    first_ms = _ask(server, prompt, 1, cached=whole_pages)
    all_ms = _ask(server, prompt, 1 + ANSWER_TOKENS, cached=whole_pages)
    longer = prompt + [FIRST_WORD] * NEW_TOKENS
    hit_ms = _ask(server, longer, 1, cached=len(prompt) // PAGE_TOKENS * PAGE_TOKENS)
    return {
        "cold prefill": cold_ms,
        f"first token of {NEW_TOKENS} new": hit_ms,
        "time per output token": (all_ms - first_ms) / ANSWER_TOKENS,
    }


def _ask(server: Server, prompt: list[int], tokens: int, cached: int) -> float:
    """Milliseconds until the whole answer is there."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
    }
    begin = time.perf_counter()
    response = requests.post(server.url + "/generate", json=body, timeout=TIMEOUT_S)
    elapsed_ms = (time.perf_counter() - begin) * 1000
    response.raise_for_status()
    meta = response.json()["meta_info"]
    found = (meta["completion_tokens"], meta["cached_tokens"])
    if found != (tokens, cached):
        raise SystemExit(f"{len(prompt)} tokens: (answered, cached) is {found}, must be {(tokens, cached)}")
    return elapsed_ms


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="Latency, ms: median over rounds (against stock)")
    sides = list(dict.fromkeys(row["side"] for row in rows))
    for name in ("metric", "context", *sides):
        table.add_column(name, justify="left" if name == "metric" else "right")
    found = {(row["metric"], row["context_tokens"], row["side"]): row["median_ms"] for row in rows}
    for metric, context in dict.fromkeys((row["metric"], row["context_tokens"]) for row in rows):
        stock = found[metric, context, "stock"]
        cells = [f"{found[metric, context, side]:,.0f} ({stock / found[metric, context, side]:.2f}x)" for side in sides]
        table.add_row(metric, f"{context:,}", *cells)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
