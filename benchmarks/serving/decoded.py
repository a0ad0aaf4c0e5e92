"""Log-probabilities of decoded tokens against a fresh prefill of the same text, for stock SGLang and every tier.

    python -m benchmarks.serving.decoded --text FILE

SGLang's own match test asks for at most 0.35 nats here. A decoded token reads its context as the tier stores it; the
fresh prefill computes the whole text in one piece, and reads nothing from the store: the difference is the codec's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.provenance import provenance, write_rows
from benchmarks.serving.parity import COMMON_ARGUMENTS, STOCK_ARGUMENTS, flush, score
from benchmarks.serving.sides import STOCK, names_among
from sglang_deltastore.host import model_path
from sglang_deltastore.host.server_process import Server, serve
from sglang_deltastore.policy.tiers import TIERS


def main() -> int:
    arguments = _parser().parse_args()
    model = arguments.model or str(model_path())
    prompts = _prompts(model, arguments)
    rows = []
    for side in arguments.sides:
        ours = ("--kv-compress", "deltastore", "--kv-compress-calibration", arguments.calibration)
        options = STOCK_ARGUMENTS if side == STOCK else (*ours, "--kv-compress-tier", side)
        differences = _differences(model, prompts, arguments.tokens, options, side)
        row = {
            "benchmark": "decoded",
            "side": side,
            "calibrated": side in TIERS and not TIERS[side].format.is_raw and arguments.calibration != "none",
            "prompts": len(prompts),
            "decoded_tokens": len(differences),
            "mean_difference_nats": statistics.fmean(differences),
            "max_difference_nats": max(differences),
        }
        rows.append({**row, "model": Path(model).name, **provenance()})
        if arguments.json:
            write_rows(arguments.json, rows)
    _print(rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.decoded", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--text", type=Path, required=True, help="plain text to take the prompts from")
    parser.add_argument("--model", default=None, help="Hugging Face folder (default: the embedded SmolLM2)")
    parser.add_argument(
        "--sides",
        type=names_among((STOCK, *TIERS)),
        default=",".join((STOCK, *TIERS)),
        help="comma-separated (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration", default="none", metavar="FILE|none|auto", help="as --kv-compress-calibration (default: none)"
    )
    parser.add_argument("--prompts", type=int, default=8, help="how many (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="decoded behind each prompt (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON row a line")
    return parser


def _prompts(model: str, arguments: argparse.Namespace) -> list[list[int]]:
    """Token ids of prompts of evenly rising length, one after the other from the text."""
    token_ids = AutoTokenizer.from_pretrained(model)(arguments.text.read_text())["input_ids"]
    lengths = [arguments.longest * (i + 1) // arguments.prompts for i in range(arguments.prompts)]
    if sum(lengths) > len(token_ids):
        raise SystemExit(f"--text {arguments.text}: {len(token_ids)} tokens; {sum(lengths)} are needed for the prompts")
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [token_ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def _differences(
    model: str, prompts: list[list[int]], tokens: int, options: tuple[str, ...], label: str
) -> list[float]:
    """|decoded - prefilled| of every decoded token's log-probability, in nats, on one server."""
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(model, (*COMMON_ARGUMENTS, *options), log_path=Path(folder) / "server.log") as server,
    ):
        for prompt in tqdm(prompts, desc=label, unit="prompt"):
            flush(server)
            answer = _decode(server, prompt, tokens)
            flush(server)
            whole = score(server, prompt + [token for _, token in answer], from_token=len(prompt))
            found += [abs(ours - again) for (ours, _), again in zip(answer, whole.logprobs, strict=True)]
    return found


def _decode(server: Server, prompt: list[int], tokens: int) -> list[tuple[float, int]]:
    """The greedy answer's tokens, each with its log-probability."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    response = requests.post(
        server.url + "/generate",
        json={"input_ids": prompt, "sampling_params": sampling, "return_logprob": True},
        timeout=600,
    )
    response.raise_for_status()
    return [(entry[0], entry[1]) for entry in response.json()["meta_info"]["output_token_logprobs"]]


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Decoded tokens against a fresh prefill of the same text")
    for name in ("side", "calibrated", "tokens", "mean |difference|, nats", "max"):
        table.add_column(name, justify="left" if name == "side" else "right")
    for row in rows:
        table.add_row(
            row["side"], "yes" if row["calibrated"] else "no", f"{row['decoded_tokens']:,}",
            f"{row['mean_difference_nats']:.4f}", f"{row['max_difference_nats']:.2f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
