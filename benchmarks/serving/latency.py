"""Latency against stock SGLang: time per output token by context, time to first token cold and on a hit, eight at once.

Three servers side by side: stock SGLang, DeltaStore with raw pages (what its attention path brings) and DeltaStore
compressed (what compression brings beyond that). A machine's speed drifts, so they are asked in short turns: a round
computes every prompt once on each side, then asks behind the cached prompts again and again, side by side, the order
turned each time. Every answer's length and cached tokens are checked; figures are medians. With `--llama-cpp` llama.cpp
is measured as well, on the file that the embedded model was converted from; what an output token costs more for each
1,000 tokens of context can be compared, the rest is another engine on other weights.

Two more servers can take their turns: `--against` another checkout of DeltaStore, to see what a change cost or brought,
and `--polled`, one whose statistics are asked for every second, to see what looking costs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.markdown import Markdown
from tqdm import tqdm

from benchmarks.provenance import provenance, write_rows
from benchmarks.serving import latency_sides, llama_baseline, report
from sglang_deltastore.host import MODELS, model_path
from sglang_deltastore.host.fetch import gguf_file
from sglang_deltastore.host.server_process import Server, serve
from sglang_deltastore.policy.tiers import DEFAULT_TIER, TIERS

PAGE_TOKENS = 16
ANSWER_TOKENS = 16
NEW_TOKENS = 32
"""Tokens of the prompt that a hit leaves to compute."""
FIRST_WORD, LAST_WORD = 1000, 12000
"""Token ids to draw prompts from: plain words in the embedded models' vocabularies."""
TIMEOUT_S = 900
TURNS, AT_ONCE_TURNS = 3, 2
"""How often each round asks behind the cached prompts."""
AT_ONCE, AT_ONCE_CONTEXT, AT_ONCE_TOKENS = 8, 1024, 32
"""Requests that share nothing, the tokens of their cached prompts, and of their answers."""
COLD, FIRST_TOKEN, PER_TOKEN = "cold prefill", f"first token of {NEW_TOKENS} new", "time per output token"
SLOPE, AT_ONCE_RATE = "per 1,000 tokens of context", f"{AT_ONCE} at once, tokens/s"

Samples = dict[tuple[str, int, str], list[float]]
"""(side, context, metric) -> milliseconds, or tokens a second; a value for each time it was measured."""


def main() -> int:
    arguments = _parser().parse_args()
    model = arguments.model or str(model_path())
    contexts = [64, 2048] if arguments.quick else sorted(arguments.contexts)
    rounds = 2 if arguments.quick else arguments.rounds
    samples: Samples = {}
    all_sides = latency_sides.sides(arguments.tier, arguments.against, arguments.polled, arguments.device)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if arguments.llama_cpp:
            _measure_llama_cpp(samples, arguments.llama_cpp, folder, contexts, rounds)
        sides = {
            name: stack.enter_context(
                serve(
                    model, _arguments(contexts, arguments.device, own), log_path=folder / f"{name}.log", environ=environ
                )
            )
            for name, (own, environ) in all_sides.items()
        }
        stack.enter_context(latency_sides.polling(sides))
        for _ in _measure(samples, sides, contexts, rounds):
            rows = _rows(samples | _slopes(samples, contexts), Path(model).name, arguments.device)
            if arguments.json:
                write_rows(arguments.json, rows)
    Console(stderr=True).print(
        Markdown("Medians, ms unless said; in brackets: times better than stock\n\n" + report.latency(rows))
    )
    return 0


def _rows(samples: Samples, model: str, device: str) -> list[dict[str, Any]]:
    facts = provenance(device)
    return [
        {
            "benchmark": "latency",
            "side": side,
            "context_tokens": context,
            "metric": metric,
            "unit": "tokens/s" if metric == AT_ONCE_RATE else "ms",
            "median": statistics.median(values),
            "least": min(values),
            "most": max(values),
            "samples": len(values),
            **_paired(samples, side, context, metric),
            "model": model,
            **facts,
        }
        for (side, context, metric), values in samples.items()
    ]


def _paired(samples: Samples, side: str, context: int, metric: str) -> dict[str, Any]:
    """How many times as long as beside it, turn by turn: the polled server against the one that is not, and the tier
    against another checkout's."""
    beside = latency_sides.beside(side, (name for name, *_ in samples))
    if beside is None:
        return {}
    pairs = zip(samples[side, context, metric], samples[beside, context, metric], strict=True)
    return {"beside": beside, "median_of_ratios": statistics.median(own / other for own, other in pairs)}


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
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="PYTHON", help="an interpreter that has llama-cpp-python: compare with it too"
    )
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="another checkout, its kernels compiled: serves the tier as well"
    )
    parser.add_argument(
        "--polled", action="store_true", help="one more server, with metrics, asked for facts every second"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON row a line")
    return parser


def _arguments(contexts: list[int], device: str, own: tuple[str, ...]) -> tuple[str, ...]:
    alone, at_once = max(contexts) + NEW_TOKENS + ANSWER_TOKENS, AT_ONCE * (AT_ONCE_CONTEXT + AT_ONCE_TOKENS)
    tokens = -(-max(2 * alone, at_once + AT_ONCE * PAGE_TOKENS) // PAGE_TOKENS) * PAGE_TOKENS
    common = (
        "--device", device, "--dtype", "float32" if device == "cpu" else "bfloat16", "--page-size", str(PAGE_TOKENS),
        "--max-running-requests", str(AT_ONCE), "--max-total-tokens", str(tokens), "--sleep-on-idle",
    )  # fmt: skip
    return (*common, *own)


def _measure(samples: Samples, sides: dict[str, Server], contexts: list[int], rounds: int) -> Iterator[None]:
    """Add every side's samples, and stop after each round; a first, unmeasured case warms the servers."""
    words = random.Random(0)

    def prompt(context: int) -> list[int]:
        return [words.randrange(FIRST_WORD, LAST_WORD) for _ in range(context)]

    def note(side: str, context: int, metric: str, value: float) -> None:
        samples.setdefault((side, context, metric), []).append(value)

    def turned(turn: int) -> list[tuple[str, Server]]:
        bar.update()
        own = list(sides.items())
        return own[turn % len(own) :] + own[: turn % len(own)]

    with tqdm(total=rounds * (len(contexts) * (1 + TURNS) + 1 + AT_ONCE_TURNS), unit="turn", file=sys.stderr) as bar:
        for server in sides.values():
            _ask(server, prompt(contexts[0]), ANSWER_TOKENS, cached=0)
        for number in range(rounds):
            alone = {context: prompt(context) for context in contexts}
            _flush(sides)
            for context, own in alone.items():
                for side, server in turned(number):
                    note(side, context, COLD, _ask(server, own, 1, cached=0)[0])
            for turn, (context, own) in product(range(TURNS), alone.items()):
                for side, server in turned(turn):
                    _, decode_ms = _ask(server, own, 1 + ANSWER_TOKENS, cached=_whole_pages(len(own) - 1))
                    note(side, context, PER_TOKEN, decode_ms / ANSWER_TOKENS)
                    longer = own + prompt(NEW_TOKENS)
                    note(side, context, FIRST_TOKEN, _ask(server, longer, 1, cached=_whole_pages(context))[0])
            together = [prompt(AT_ONCE_CONTEXT) for _ in range(AT_ONCE)]
            _flush(sides)
            for (_, server), own in product(turned(number), together):
                _ask(server, own, 1, cached=0)
            for turn in range(AT_ONCE_TURNS):
                for side, server in turned(turn):
                    note(side, AT_ONCE_CONTEXT, AT_ONCE_RATE, _at_once(server, together))
            yield


def _measure_llama_cpp(samples: Samples, python: Path, folder: Path, contexts: list[int], rounds: int) -> None:
    gguf = gguf_file(MODELS["smollm2"], folder / "gguf")
    for _ in tqdm(range(rounds), desc="llama.cpp", unit="round", file=sys.stderr):
        for kv_type in llama_baseline.KV_TYPES:
            found = llama_baseline.times(python, gguf, kv_type, contexts, os.cpu_count() or 1)
            for context, value in found.items():
                samples.setdefault((f"llama.cpp {kv_type}", context, PER_TOKEN), []).append(value)


def _slopes(samples: Samples, contexts: list[int]) -> Samples:
    """What an output token costs more for each 1,000 tokens, between the shortest and the longest context."""
    shortest, longest = contexts[0], contexts[-1]
    if shortest == longest:
        return {}
    thousands = (longest - shortest) / 1000
    return {
        (side, longest, SLOPE): [
            (late - early) / thousands
            for early, late in zip(samples[side, shortest, PER_TOKEN], samples[side, longest, PER_TOKEN], strict=True)
        ]
        for side in dict.fromkeys(side for side, _, metric in samples if metric == PER_TOKEN)
    }


def _flush(sides: dict[str, Server]) -> None:
    for server in sides.values():
        requests.post(server.url + "/flush_cache?timeout=60", timeout=90).raise_for_status()


def _whole_pages(tokens: int) -> int:
    return tokens // PAGE_TOKENS * PAGE_TOKENS


def _at_once(server: Server, prompts: list[list[int]]) -> float:
    """Output tokens a second of prompts asked together, each behind its own cached pages."""
    cached = _whole_pages(AT_ONCE_CONTEXT - 1)
    with ThreadPoolExecutor(len(prompts)) as threads:
        begin = time.perf_counter()
        for asked in [threads.submit(_ask, server, prompt, AT_ONCE_TOKENS, cached) for prompt in prompts]:
            asked.result()
        return len(prompts) * AT_ONCE_TOKENS / (time.perf_counter() - begin)


def _ask(server: Server, prompt: list[int], tokens: int, cached: int) -> tuple[float, float]:
    """Milliseconds until the first token, and from there to the last one. Raises SystemExit on any other answer."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        "stream": True,
    }
    arrivals_s, meta = [], {}
    begin = time.perf_counter()
    with requests.post(server.url + "/generate", json=body, timeout=TIMEOUT_S, stream=True) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                arrivals_s.append(time.perf_counter() - begin)
                meta = json.loads(line.removeprefix(b"data: "))["meta_info"]
    found = (meta.get("completion_tokens"), meta.get("cached_tokens"))
    if found != (tokens, cached):
        raise SystemExit(f"{len(prompt)} tokens: (answered, cached) is {found}, must be {(tokens, cached)}")
    return arrivals_s[0] * 1000, (arrivals_s[-1] - arrivals_s[0]) * 1000


if __name__ == "__main__":
    sys.exit(main())
