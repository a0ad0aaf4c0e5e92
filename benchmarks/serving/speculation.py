"""Speculative decoding: the same greedy texts as without it, and how much sooner.

    make results-speculation

A server of each tier without drafts and one of each algorithm are asked in turn behind cached prompts: some repeat
themselves (code, JSON, lists), some do not. Drafts make matrix products of another shape, which round otherwise, and so
do requests that run at once: how many texts are the same four at once, without drafts, is the yardstick. SGLang's own
`torch_native` attention cannot verify drafts, so stock is asked without them.

With STANDALONE a model drafts; unless another is given the served one itself, which guesses best and costs most.
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
NGRAM, STANDALONE = ALGORITHMS = ("NGRAM", "STANDALONE")
PLAIN_DECODING = "plain decoding"
SIDES = (STOCK, *TIERS)
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
    most = 3 if arguments.quick else arguments.prompts
    kinds = {
        kind: [before + text for text in found[:: -(-len(found) // most) if most else 1]]
        for kind, found in prompts().items()
    }
    rows = []
    for tier in arguments.tiers:
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
        "--tiers", type=names_among(SIDES), default=",".join(SIDES), help="comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration", default="auto", metavar="FILE|none|auto", help="as --kv-compress-calibration (default: auto)"
    )
    parser.add_argument(
        "--algorithms", type=names_among(ALGORITHMS), default=NGRAM, help="comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--draft-model", default=None, metavar="FOLDER", help=f"of {STANDALONE} (default: the served model)"
    )
    parser.add_argument("--drafts", type=int, default=8, help="of a step (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=0, metavar="T", help="tokens of notes before each prompt (default: none)"
    )
    parser.add_argument("--prompts", type=int, default=None, metavar="N", help="of each kind (default: all)")
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
    sides = {PLAIN_DECODING: STOCK_ARGUMENTS if tier == STOCK else options}
    if tier != STOCK:
        sides |= {algorithm: (*options, *_drafts(algorithm, model, arguments)) for algorithm in arguments.algorithms}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {
            name: stack.enter_context(serve(model, (*COMMON_ARGUMENTS, *own), log_path=Path(folder) / f"{name}.log"))
            for name, own in sides.items()
        }
        found = {
            kind: [_ask(servers, text, arguments.tokens) for text in tqdm(texts, desc=f"{tier}, {kind}", unit="prompt")]
            for kind, texts in kinds.items()
        }
        at_once = {kind: _at_once(servers[PLAIN_DECODING], texts, arguments.tokens) for kind, texts in kinds.items()}
    return [row for kind, answers in found.items() for row in _rows(tier, kind, answers, at_once[kind], arguments)]


def _drafts(algorithm: str, model: str, arguments: argparse.Namespace) -> tuple[str, ...]:
    """Arguments of a server that drafts so."""
    drafts = ("--speculative-algorithm", algorithm, "--speculative-num-draft-tokens", str(arguments.drafts))
    draft_model = ("--speculative-draft-model-path", arguments.draft_model or model)
    return (*drafts, *draft_model) if algorithm == STANDALONE else drafts


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


def _rows(
    tier: str, kind: str, answers: list[dict[str, Answer]], at_once: list[Answer], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One for each algorithm, or one for stock."""
    plain = [answer[PLAIN_DECODING] for answer in answers]
    row = {
        "benchmark": "speculation",
        "tier": tier,
        "kind": kind,
        "calibrated": tier not in (STOCK, "raw") and arguments.calibration != "none",
        "prompts": len(answers),
        "tokens": arguments.tokens,
        "context_tokens": arguments.context,
        "tokens_per_s": statistics.median(answer.tokens_per_s for answer in plain),
        "same_texts_at_once": sum(
            answer.token_ids == other.token_ids for answer, other in zip(plain, at_once, strict=True)
        ),
    }
    if tier == STOCK:
        return [row]
    return [
        row | _with_drafts(algorithm, plain, [answer[algorithm] for answer in answers], arguments.drafts)
        for algorithm in arguments.algorithms
    ]


def _with_drafts(algorithm: str, plain: list[Answer], drafted: list[Answer], drafts: int) -> dict[str, Any]:
    pairs = list(zip(plain, drafted, strict=True))
    return {
        "algorithm": algorithm,
        "draft_tokens": drafts,
        "same_texts": sum(answer.token_ids == other.token_ids for answer, other in pairs),
        "drafted_tokens_per_s": statistics.median(answer.tokens_per_s for answer in drafted),
        "times": statistics.median(other.tokens_per_s / answer.tokens_per_s for answer, other in pairs),
        "accepted_per_step": statistics.fmean(answer.accepted_per_step for answer in drafted),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Greedy texts with drafts, and without")
    left, right = (
        ("tier", "prompts", "drafts"),
        ("tokens/s", "same at once", "same texts", "with them", "times", "a step"),
    )
    for name in (*left, *right):
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        found = [row["tier"], f"{row['prompts']} {row['kind']}", row.get("algorithm", "")]
        found += [f"{row['tokens_per_s']:.1f}", f"{row['same_texts_at_once']} of {row['prompts']}"]
        if "times" in row:
            found += [f"{row['same_texts']} of {row['prompts']}", f"{row['drafted_tokens_per_s']:.1f}"]
            found += [f"{row['times']:.2f}", f"{row['accepted_per_step']:.2f}"]
        table.add_row(*found)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
