"""What compression costs token by token of a long prompt, beside what half precision alone costs: by kind of text, by
how much lies before a token, and by how much of that it still reads raw.

    python -m benchmarks.long_context --texts wikitext.txt code.txt chat.txt tools.txt

One sequence of the second half of each text, computed in chunks of 512 tokens as a server does: a token reads the
chunks before its own as the tier stores them. Rows are added as they come; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache

from benchmarks.first_start import NONE, PACKED, SHIPPED, calibrated, candidates_of, halves
from benchmarks.provenance import RESULTS, provenance
from benchmarks.quality import MODELS
from sglang_deltastore.lab.quality import Scores, measure_in_chunks, sequences
from sglang_deltastore.lab.quality_command import load_model, model_folder

CHUNK_TOKENS = 512
HALF_PRECISION = "bfloat16"
"""Not ours: the model as it comes, weights, activations and cache in bfloat16."""
POSITIONS = (1024, 2048, 4096, 8192)
"""Ends of the ranges of positions that are told apart; the first begins where the first chunk ends."""
DISTANCES = (16, 64, 256, 512)
"""The same for a token's place in its chunk: so many tokens, itself included, it reads raw."""


def main() -> int:
    arguments = _parser().parse_args()
    known = [json.loads(line) for line in arguments.json.read_text().splitlines()] if arguments.json.exists() else []
    done = {(row["model"], row["text"]) for row in known}
    for name in arguments.models:
        texts = [path for path in arguments.texts if (name, path.name) not in done]
        if texts:
            _measure_model(name, texts, arguments.tokens, arguments.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_context", description=__doc__.split("\n\n")[0])
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="plain texts, each of one kind")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--tokens", type=int, default=8000, help="of a text (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "long-context.jsonl", help="rows are added (default: %(default)s)"
    )
    return parser


def _measure_model(name: str, texts: list[Path], tokens: int, rows: Path) -> None:
    folder = model_folder(name)
    model, tokenizer = load_model(folder)
    half, _ = load_model(folder, HALF_PRECISION)
    with tempfile.TemporaryDirectory() as scratch:
        calibrations = {NONE: None, SHIPPED: calibrated(name, Path(scratch))}
    for path in texts:
        _, measured = halves(path.read_text(encoding="utf-8"))
        [ids] = sequences(tokenizer, measured, 1, tokens, seed=0)
        sides = {f"{HALF_PRECISION}, {NONE}": (half, DynamicCache())}
        for ours in candidates_of(PACKED, calibrations):
            sides[ours.name] = (model, ours.cache(model, quantize_at_once=False))
        with tqdm(total=-(-tokens // CHUNK_TOKENS), unit="chunk", desc=f"{name}, {path.name}") as bar:
            scores = measure_in_chunks(model, ids, sides, CHUNK_TOKENS, bar.update)
        with rows.open("a") as out:
            for side, found in scores.items():
                config, calibrated_on = side.split(", ")
                told = {"model": name, "text": path.name, "config": config, "calibrated_on": calibrated_on}
                size = {"tokens": tokens, "chunk_tokens": CHUNK_TOKENS}
                out.write(json.dumps(told | size | figures(found) | provenance(model.device.type)) + "\n")


def figures(scores: Scores) -> dict[str, Any]:
    """The row's: over all scored tokens, and mean KL in nats by the end of a range of positions, and of distances."""
    kl = torch.cat(scores.kl).double()
    places = torch.arange(len(kl))
    return scores.metrics() | {
        "kl_by_position": _means(kl, CHUNK_TOKENS + places, POSITIONS),
        "kl_by_distance": _means(kl, places % CHUNK_TOKENS, DISTANCES),
    }


def _means(kl: torch.Tensor, values: torch.Tensor, ends: tuple[int, ...]) -> dict[str, float]:
    """Of the tokens whose value lies below an end and not below the one before; empty ranges are left out."""
    ranges = torch.bucketize(values, torch.tensor(ends), right=True)
    return {str(end): kl[ranges == at].mean().item() for at, end in enumerate(ends) if (ranges == at).any()}


if __name__ == "__main__":
    sys.exit(main())
