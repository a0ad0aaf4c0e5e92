"""What is to be had from 4x to 12x, as served: KL against ratio of our tiers, of fewer bits and
fewer tokens in every mix, of the published recipes, and of others' formats.

    python -m benchmarks.frontier --text wikitext.txt

Calibrated as a server does it at its first start; what is expected of queries is learned from the same text, which
comes with the package. Rows are added as they come, and what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from benchmarks.first_start import calibrated
from benchmarks.provenance import RESULTS, provenance, write_rows
from sglang_deltastore.lab import peers, published
from sglang_deltastore.lab.candidates import Other, Ours
from sglang_deltastore.lab.collecting import expected_attention
from sglang_deltastore.lab.eviction import ExpectedAttention
from sglang_deltastore.lab.plot import pareto
from sglang_deltastore.lab.quality import Candidate, measure, sequences
from sglang_deltastore.lab.quality_command import load_model, model_folder
from sglang_deltastore.lab.suites import CLAIMS, Subject, evicting, measure_spread
from sglang_deltastore.lab.support import attention_shape
from sglang_deltastore.policy import calibration_text
from sglang_deltastore.policy.calibration import load
from sglang_deltastore.policy.tiers import TIERS

MODEL = "smollm2"
LEAST_RATIO = 4.0
"""Of others' formats: what takes more bits is in the suite `peers`; QuantizedCache is much like KIVI."""
EVICTED_TO = (7.5, 9.0, 10.2, 11.7)
"""Ratios of the published tiers that evict, and one before them."""
PUBLISHED = ("Conservative, K4V2", "K4V4 PE30", "K4V2 PE50", "Balanced, K4V2 PE30", "Aggressive, K4V2 PE10")
ALL_BUT_SOME = 0.95
"""A tier that keeps more has this ratio by itself."""
EVICTING_PAGE_TOKENS = 64
"""Small enough for a server; a layer keeps 1 to 4 of its tiles."""
FITTED_SEQUENCES, FITTED_TOKENS = 8, 1024
"""What is expected of queries is learned from these."""


@dataclass(frozen=True)
class Length:
    """Sequences of so many tokens, of which the last are scored behind the others."""

    tokens: int
    new_tokens: int
    sequences: int


LENGTHS = (Length(512, 256, 3), Length(2048, 512, 2))
AT_ONCE = 6
"""Rows that share what the model itself says of a sequence, and are written together."""


def main() -> int:
    arguments = _parser().parse_args()
    model, tokenizer = load_model(model_folder(MODEL))
    with tempfile.TemporaryDirectory() as folder:
        calibration = load(arguments.calibration) if arguments.calibration else calibrated(MODEL, Path(folder))
    learned = calibration_text.sequences(tokenizer, FITTED_SEQUENCES, FITTED_TOKENS)
    expected = expected_attention(model, learned)
    rows = [json.loads(line) for line in arguments.json.read_text().splitlines()] if arguments.json.exists() else []
    text = arguments.text.read_text(encoding="utf-8")
    for length in LENGTHS:
        if length.tokens not in arguments.tokens:
            continue
        token_ids = sequences(tokenizer, text, length.sequences, length.tokens, seed=0)
        subject = Subject(model, token_ids, calibration)
        done = {row["config"] for row in rows if row["tokens"] == length.tokens}
        missing = [each for each in candidates(subject, expected, length) if each.name not in done]
        source = {"model": MODEL, "text": arguments.text.name, "sequences": length.sequences, "tokens": length.tokens}
        source |= {"new_tokens": length.new_tokens, "seed": 0, "suite": "frontier"}
        for first in tqdm(range(0, len(missing), AT_ONCE), f"{length.tokens} tokens"):
            asked = missing[first : first + AT_ONCE]
            found = measure(model, token_ids, asked, ("continue",), new_tokens=length.new_tokens)
            rows += [source | row | provenance(model.device.type) for row in found]
            write_rows(arguments.json, rows)
    pareto(rows, f"{MODEL}, {arguments.text.name}, served", arguments.plot, by="tokens")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="plain text to measure on")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[each.tokens for each in LENGTHS],
        choices=[each.tokens for each in LENGTHS], help="of a sequence (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="by deltastore calibrate (default: made as a server makes it)"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "frontier.jsonl", help="default: %(default)s")
    parser.add_argument("--plot", type=Path, default=RESULTS / "frontier.png", help="default: %(default)s")
    return parser


def candidates(subject: Subject, expected: ExpectedAttention, length: Length) -> Iterator[Candidate]:
    """All rows of a length."""
    stored = length.tokens - length.new_tokens
    packed = [tier for tier in TIERS.values() if not tier.format.is_raw]
    yield from (Ours(tier.name, tier, calibration=subject.calibration) for tier in packed)
    for ratio in EVICTED_TO:
        for tier in packed:
            ours = evicting(subject, tier, ratio, stored, expected, EVICTING_PAGE_TOKENS)
            if ours.eviction and min(ours.eviction.shares) < ALL_BUT_SOME:
                yield replace(ours, name=f"{tier.name} at {ratio:g}x, expected")
        # As the suite `claims` does it: by what tokens have received so far.
        yield replace(
            evicting(subject, TIERS["conservative"], ratio, stored), name=f"conservative at {ratio:g}x, received"
        )
    spread = measure_spread(subject)
    for claim in CLAIMS:
        if claim.name in PUBLISHED:
            shares = claim.schedule and tuple(claim.schedule.shares(subject.num_layers, spread))
            method = published.absmax(claim.key_bits, claim.value_bits)
            yield Other(f"{claim.name} (claimed {claim.claimed_ratio}x)", method, shares, per_head=True)
    head_dim = attention_shape(subject.model.config).head_dim
    yield from (
        Other(method.name, method)
        for method in peers.methods(subject.num_layers)
        if not method.name.startswith("QuantizedCache") and 16 / method.bits_per_value(head_dim) >= LEAST_RATIO
    )


if __name__ == "__main__":
    sys.exit(main())
