"""Speculative decoding with n-grams: the same greedy texts as without it, and how much sooner.

    make results-speculation

Two servers of each tier, one with NGRAM, are asked in turn behind cached prompts: some repeat themselves (code, JSON,
lists), some do not. Drafts make matrix products of another shape, which round otherwise, and so do requests that run
at once: how many texts are the same four at once, without drafts, is the yardstick. SGLang's own `torch_native`
attention cannot verify drafts, so stock is asked without them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.provenance import provenance, write_rows
from benchmarks.serving.parity import AT_ONCE, COMMON_ARGUMENTS, STOCK_ARGUMENTS
from benchmarks.serving.sides import STOCK, names_among
from sglang_deltastore.host import model_path
from sglang_deltastore.host.server_process import Server, serve
from sglang_deltastore.policy.tiers import TIERS

REPETITIVE, PLAIN = "repetitive", "plain"
FIELDS = ("name", "size", "price", "count", "color", "place", "owner", "date", "weight", "state")
WORDS = ("river", "winter", "bridge", "market", "letter", "garden", "engine", "island", "teacher", "forest")


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    tokens_per_s: float
    accepted_per_step: float


def main() -> int:
    arguments = _parser().parse_args()
    model = arguments.model or str(model_path())
    before = notes(model, arguments.context)
    kinds = {
        kind: [before + text for text in found[: 3 if arguments.quick else None]] for kind, found in prompts().items()
    }
    rows = []
    for tier in (STOCK, *arguments.tiers):
        for row in _measure(model, tier, kinds, arguments):
            rows.append({**row, "model": Path(model).name, **provenance()})
            if arguments.json:
                write_rows(arguments.json, rows)
    _print(rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.speculation", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--model", default=None, help="Hugging Face folder (default: the embedded SmolLM2)")
    parser.add_argument(
        "--tiers", type=names_among(TIERS), default=",".join(TIERS), help="comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration", default="auto", metavar="FILE|none|auto", help="as --kv-compress-calibration (default: auto)"
    )
    parser.add_argument("--drafts", type=int, default=8, help="of a step (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=0, metavar="T", help="tokens of notes before each prompt (default: none)"
    )
    parser.add_argument("--quick", action="store_true", help="three prompts of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON row a line")
    return parser


def prompts() -> dict[str, list[str]]:
    """Texts by kind: 30 that repeat themselves, 10 that do not."""
    code = [
        "".join(f"def get_{field}(self):\n    return self._{field}\n\n" for field in _turned(FIELDS, i)) + "def set_"
        for i in range(10)
    ]
    objects = [
        "[\n" + "".join(f'  {{"id": {k}, "{field}": "{WORDS[k]}"}},\n' for k in range(8))
        for field in FIELDS
    ]  # fmt: skip
    lists = [
        "Inventory:\n" + "".join(f"- one {word}, in good order, on shelf {i}\n" for word in _turned(WORDS, i))
        for i in range(10)
    ]
    plain = [f"The {word} was quiet that morning, and nobody expected what came next." for word in WORDS]
    return {REPETITIVE: code + objects + lists, PLAIN: plain}


def notes(model: str, tokens: int) -> str:
    """So many tokens of text that all prompts begin with."""
    lines = (
        f"Note {i}: the {WORDS[i % 10]} behind the {WORDS[i * 7 % 9]} had {i * 37 % 101} visitors.\n"
        for i in range(tokens)
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    return str(tokenizer.decode(tokenizer("".join(lines))["input_ids"][:tokens])) if tokens else ""


def _turned(items: tuple[str, ...], by: int) -> tuple[str, ...]:
    return items[by:] + items[:by]


def _measure(model: str, tier: str, kinds: dict[str, list[str]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    calibration = "none" if tier == "raw" else arguments.calibration
    options = ("--kv-compress", "deltastore", "--kv-compress-tier", tier, "--kv-compress-calibration", calibration)
    drafts = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(arguments.drafts))
    sides = {"plain": STOCK_ARGUMENTS} if tier == STOCK else {"plain": options, "ngram": (*options, *drafts)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {
            name: stack.enter_context(serve(model, (*COMMON_ARGUMENTS, *own), log_path=Path(folder) / f"{name}.log"))
            for name, own in sides.items()
        }
        found = {
            kind: [_ask(servers, text, arguments.tokens) for text in tqdm(texts, desc=f"{tier}, {kind}", unit="prompt")]
            for kind, texts in kinds.items()
        }
        at_once = {kind: _at_once(servers["plain"], texts, arguments.tokens) for kind, texts in kinds.items()}
    return [_row(tier, kind, answers, at_once[kind], arguments) for kind, answers in found.items()]


def _at_once(server: Server, texts: list[str], tokens: int) -> list[Answer]:
    with ThreadPoolExecutor(AT_ONCE) as clients:
        return list(clients.map(lambda text: _generate(server, text, tokens), texts))


def _ask(servers: dict[str, Server], text: str, tokens: int) -> dict[str, Answer]:
    """Each server's answer, asked once to have the prompt in its cache and once to be timed."""
    for server in servers.values():
        _generate(server, text, 1)
    return {name: _generate(server, text, tokens) for name, server in servers.items()}


def _generate(server: Server, text: str, tokens: int) -> Answer:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    response = requests.post(server.url + "/generate", json={"text": text, "sampling_params": sampling}, timeout=600)
    response.raise_for_status()
    answer = response.json()
    meta = answer["meta_info"]
    return Answer(answer["output_ids"], tokens / meta["e2e_latency"], meta.get("spec_accept_length", 1.0))


def _row(
    tier: str, kind: str, answers: list[dict[str, Answer]], at_once: list[Answer], arguments: argparse.Namespace
) -> dict[str, Any]:
    row = {
        "benchmark": "speculation",
        "tier": tier,
        "kind": kind,
        "calibrated": tier not in (STOCK, "raw") and arguments.calibration != "none",
        "prompts": len(answers),
        "tokens": arguments.tokens,
        "context_tokens": arguments.context,
        "tokens_per_s": statistics.median(answer["plain"].tokens_per_s for answer in answers),
        "same_texts_at_once": sum(
            answer["plain"].token_ids == other.token_ids for answer, other in zip(answers, at_once, strict=True)
        ),
    }
    if tier == STOCK:
        return row
    pairs = [(answer["plain"], answer["ngram"]) for answer in answers]
    return row | {
        "draft_tokens": arguments.drafts,
        "same_texts": sum(plain.token_ids == ngram.token_ids for plain, ngram in pairs),
        "ngram_tokens_per_s": statistics.median(ngram.tokens_per_s for _, ngram in pairs),
        "times": statistics.median(ngram.tokens_per_s / plain.tokens_per_s for plain, ngram in pairs),
        "accepted_per_step": statistics.fmean(ngram.accepted_per_step for _, ngram in pairs),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Greedy texts with drafts of n-grams, and without")
    for name in ("tier", "prompts", "tokens/s", "same at once", "same texts", "with NGRAM", "times", "accepted a step"):
        table.add_column(name, justify="left" if name in ("tier", "prompts") else "right")
    for row in rows:
        found = [row["tier"], f"{row['prompts']} {row['kind']}", f"{row['tokens_per_s']:.1f}"]
        found += [f"{row['same_texts_at_once']} of {row['prompts']}"]
        if "times" in row:
            found += [f"{row['same_texts']} of {row['prompts']}", f"{row['ngram_tokens_per_s']:.1f}"]
            found += [f"{row['times']:.2f}", f"{row['accepted_per_step']:.2f}"]
        table.add_row(*found)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
