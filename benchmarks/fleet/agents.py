"""Recorded agents as a trace that `deltastore replay` reads: every turn a request, in the order of the serving
benchmark's workloads.

    python -m benchmarks.fleet.agents airline --data FOLDER --model FOLDER --out airline.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.serving.workloads import MODEL_CONTEXT_TOKENS, Request, Sizes, Texts, build
from sglang_deltastore.fleet.formats import OWN_FORMAT

SIZES = {
    "airline": Sizes(96, 64, MODEL_CONTEXT_TOKENS, 4096, 64),
    "tools": Sizes(96, 64, MODEL_CONTEXT_TOKENS, 7168, 64),
}
"""Sessions and limits: nearly all that was recorded, whole system prompts."""
BLOCK_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=SIZES)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="whose tokenizer counts")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    write(args.workload, Texts(args.data, args.model), args.out)


def write(workload: str, texts: Texts, path: Path) -> None:
    path.write_text(trace(build(workload, texts, SIZES[workload])))


def trace(requests: list[Request]) -> str:
    """A second from one request to the next. The answers' tokens are not known: the next turn's prompt has them."""
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    lines = [json.dumps({"format": OWN_FORMAT, "block_tokens": BLOCK_TOKENS})]
    for number, request in enumerate(requests):
        line = {"time_s": float(number), "prompt_tokens": len(request.prompt), "answer_tokens": request.answer_tokens}
        lines.append(json.dumps(line | {"blocks": chained_blocks(request.prompt, known)}))
    return "\n".join(lines) + "\n"


def chained_blocks(tokens: Sequence[int], known: dict[tuple[int, tuple[int, ...]], int]) -> list[int]:
    """Ids of whole blocks: equal for equal tokens behind equal blocks. `known` grows."""
    ids, before = [], -1
    for start in range(0, len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS):
        before = known.setdefault((before, tuple(tokens[start : start + BLOCK_TOKENS])), len(known))
        ids.append(before)
    return ids


if __name__ == "__main__":
    main()
