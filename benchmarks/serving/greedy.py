"""Long greedy answers of every tier beside stock SGLang's: how many are the same text, where they part, how much they
repeat themselves, how long they are; and stock in bfloat16, for what half precision alone does to them.

    python -m benchmarks.serving.greedy --texts wikitext.txt code.txt chat.txt tools.txt

Two pieces of each text are prompts; all are answered at once, as one batch that nobody leaves before the end. What an
answer says behind the model's end token is cut off. Rows are written side by side.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig

from benchmarks.first_start import halves
from benchmarks.provenance import RESULTS, provenance, write_rows
from benchmarks.serving.parity import STOCK_ARGUMENTS
from benchmarks.serving.sides import STOCK, names_among
from sglang_deltastore.host.models import MODELS, model_path
from sglang_deltastore.host.server_process import serve
from sglang_deltastore.policy.tiers import TIERS

PROMPTS_OF_A_TEXT = 2
PROMPT_TOKENS = 512
REPEATED_TOKENS = 4
"""A run of so many tokens that the answer has had before is a repetition."""
TIMEOUT_S = 3600


@dataclass(frozen=True)
class Side:
    """A server of the comparison: `stock`, `stock bfloat16`, a tier, or a tier `not calibrated`."""

    name: str

    @property
    def arguments(self) -> tuple[str, ...]:
        of, _, how = self.name.partition(" ")
        if of == STOCK:
            return ("--dtype", how or "float32", *STOCK_ARGUMENTS)
        calibration = "none" if how else "auto"
        ours = ("--kv-compress", "deltastore", "--kv-compress-tier", of, "--kv-compress-calibration", calibration)
        return ("--dtype", "float32", *ours)


PACKED = [name for name, tier in TIERS.items() if not tier.format.is_raw]
SIDES = (STOCK, f"{STOCK} bfloat16", "raw", *PACKED, *(f"{name} not calibrated" for name in PACKED))


def main() -> int:
    arguments = _parser().parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        folder = model_path(name)
        prompts = _prompts(folder, arguments.texts)
        end_ids = _end_ids(folder)
        stock: list[list[int]] = []
        for side in dict.fromkeys((STOCK, *arguments.sides)):
            answers = [until(answer, end_ids) for answer in _answers(folder, prompts, arguments.tokens, Side(side))]
            stock = stock or answers
            told = {
                "benchmark": "greedy",
                "model": name,
                "side": side,
                "texts": [path.name for path in arguments.texts],
            }
            rows.append({**told, **compared(stock, answers, arguments.tokens), **provenance()})
            write_rows(arguments.json, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.greedy", description=__doc__.split("\n\n", maxsplit=1)[0]
    )
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="plain texts to take the prompts from")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument(
        "--sides", type=names_among(SIDES), default=",".join(SIDES), help="comma-separated (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=1000, help="of an answer (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=RESULTS / "greedy.jsonl", help="default: %(default)s")
    return parser


def _prompts(folder: Path, texts: Sequence[Path]) -> list[list[int]]:
    """Token ids of evenly spaced pieces of the second half of each text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for path in texts:
        ids = tokenizer(halves(path.read_text(encoding="utf-8"))[1], verbose=False)["input_ids"]
        begins = [tokenizer.bos_token_id] if ids[0] == tokenizer.bos_token_id else []
        for at in range(PROMPTS_OF_A_TEXT):
            start = len(begins) + at * len(ids) // PROMPTS_OF_A_TEXT
            found.append(begins + ids[start : start + PROMPT_TOKENS - len(begins)])
    return found


def _end_ids(folder: Path) -> set[int]:
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


def _answers(folder: Path, prompts: list[list[int]], tokens: int, side: Side) -> list[list[int]]:
    """The greedy answers of one server to all prompts, which it gets in one request."""
    capacity_tokens = len(prompts) * (PROMPT_TOKENS + tokens + 64)
    options = ("--device", "cpu", "--page-size", "16", "--max-running-requests", str(len(prompts)))
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    with (
        tqdm(total=1, desc=side.name, unit="batch") as bar,
        tempfile.TemporaryDirectory() as scratch,
        serve(
            folder,
            (*options, "--max-total-tokens", str(capacity_tokens), *side.arguments),
            log_path=Path(scratch) / "log",
        ) as server,
    ):
        response = requests.post(
            server.url + "/generate", json={"input_ids": prompts, "sampling_params": sampling}, timeout=TIMEOUT_S
        )
        response.raise_for_status()
        bar.update()
        return [answer["output_ids"] for answer in response.json()]


def until(answer: Sequence[int], end_ids: set[int]) -> list[int]:
    """The answer up to its first end token, that one included."""
    ended = next((at + 1 for at, token in enumerate(answer) if token in end_ids), len(answer))
    return list(answer[:ended])


def compared(stock: list[list[int]], answers: list[list[int]], tokens: int) -> dict[str, Any]:
    """The row's figures. parted_at_tokens: how many are the same before an answer parts from stock's; all that were
    asked for where it does not."""
    parted = [tokens if one == other else agreed(one, other) for one, other in zip(stock, answers, strict=True)]
    return {
        "answers": len(answers),
        "asked_tokens": tokens,
        "same": sum(one == other for one, other in zip(stock, answers, strict=True)),
        "parted_at_tokens": parted,
        "parted_at_tokens_median": statistics.median(parted),
        "repeated_share": statistics.fmean(map(repeated_share, answers)),
        "ended": sum(len(answer) < tokens for answer in answers),
        "length_tokens_mean": statistics.fmean(map(len, answers)),
    }


def agreed(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def repeated_share(answer: Sequence[int]) -> float:
    """Of the answer's runs of REPEATED_TOKENS tokens, how many it has had before; 0 where it is shorter than one."""
    runs = [tuple(answer[at : at + REPEATED_TOKENS]) for at in range(len(answer) - REPEATED_TOKENS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


if __name__ == "__main__":
    sys.exit(main())
