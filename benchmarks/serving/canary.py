"""The canary against an offline twin, on a workload: what a server says that compression cost its own answers.

    python -m benchmarks.serving.canary --data FOLDER --quick --json FILE

Each side is a server that samples every request of the airline workload and runs all of them again, whatever time that
takes. The same requests with the same answers then go through a transformers model twice, with its own cache and with
the side's pages, in the pieces in which the server has computed them: KL over the whole vocabulary, teacher-forced, and
over the canary's 20 most likely tokens and the rest.
Last, a server that samples a hundredth of the requests every other time that it serves the same: what that costs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from benchmarks.provenance import provenance, write_rows
from sglang_deltastore.host import model_path
from sglang_deltastore.host.server_process import Server, serve
from sglang_deltastore.lab.cache import DeltaStoreCache
from sglang_deltastore.lab.quality import Scores
from sglang_deltastore.lab.quality_command import load_model
from sglang_deltastore.observe.canary import compared, most_likely
from sglang_deltastore.observe.stats import StoreStats
from sglang_deltastore.policy.tiers import TIERS, Tier

from .canary_plugins import REST, install
from .client import Answer, ask, flush
from .runner import run_slice
from .workloads import Prompt, Request, Sizes, Texts, build

QUICK = Sizes(sessions=3, turns=4, context_tokens=1024, system_tokens=512, answer_tokens=24)
FULL = Sizes(sessions=4, turns=4, context_tokens=1536, system_tokens=512, answer_tokens=24)
PAIRED = Sizes(sessions=8, turns=8, context_tokens=1024, system_tokens=512, answer_tokens=16)
CAPACITY_TOKENS = 16384
COMMON_ARGUMENTS = (
    "--device", "cpu", "--dtype", "float32", "--page-size", "16", "--max-running-requests", "4", "--sleep-on-idle",
    "--max-total-tokens", str(CAPACITY_TOKENS), "--enable-metrics", "--kv-compress", "deltastore",
)  # fmt: skip
RUN_TIMEOUT_S = 1800
AT_ONCE = 2


@dataclass(frozen=True)
class Side:
    name: str
    tier: Tier
    calibration: str

    @property
    def arguments(self) -> tuple[str, ...]:
        return "--kv-compress-tier", self.tier.name, "--kv-compress-calibration", self.calibration


SIDES = [
    Side("raw", TIERS["raw"], "none"),
    Side("lossless", TIERS["lossless"], "auto"),
    Side("k4v2", TIERS["k4v2"], "auto"),
    Side("k4v2, not calibrated", TIERS["k4v2"], "none"),
    Side("conservative, not calibrated", TIERS["conservative"], "none"),
    Side("2 and 2 bits, not calibrated", TIERS["k2v2"], "none"),
]


def main() -> int:
    arguments = _parser().parse_args()
    model_folder = Path(arguments.model or model_path())
    texts = Texts(arguments.data, model_folder)
    requests = build("airline", texts, QUICK if arguments.quick else FULL)
    known = {side.name: side for side in SIDES}
    if unknown := set(arguments.sides) - set(known):
        raise SystemExit(f"--sides {sorted(unknown)}: unknown; known are {', '.join(known)}")
    rows: list[dict[str, Any]] = []
    model, _ = load_model(model_folder)

    def add(row: dict[str, Any]) -> None:
        rows.append({"benchmark": "canary", **row, "model": model_folder.name, **provenance()})
        if arguments.json:
            write_rows(arguments.json, rows)

    for name in arguments.sides:
        add(_side(known[name], model, model_folder, requests))
    for share in arguments.shares:
        for row in _pairs(model_folder, build("airline", texts, PAIRED), arguments.pairs, share):
            add(row)
    _print(rows)
    return 0


def _side(side: Side, model: PreTrainedModel, model_folder: Path, requests: Sequence[Request]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        environ = install(Path(folder) / "plugins", "uncapped")
        options = (*COMMON_ARGUMENTS, *side.arguments, "--kv-compress-canary", "1")
        with serve(model_folder, options, log_path=Path(folder) / "log", environ=environ) as server:
            before = settled(server)
            answers = [
                ask(server.url, request.prompt, request.answer_tokens) for request in tqdm(requests, desc=side.name)
            ]
            after = settled(server)
    tokens = after.canary_tokens - before.canary_tokens
    left_out = after.canary_too_long + after.canary_overtaken + after.canary_not_comparable
    if tokens != sum(len(answer.output_ids) for answer in answers) or left_out or after.observation_errors:
        raise RuntimeError(f"{side.name}: not every answer was compared: {after}")
    return {
        "part": "quality",
        "side": side.name,
        "requests": len(requests),
        "answered_tokens": tokens,
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "hit_tokens": sum(answer.cached_tokens for answer in answers),
        "canary_kl_mean": (after.canary_kl_nats - before.canary_kl_nats) / tokens,
        "canary_kl_worst": after.canary_kl_worst,
        "canary_top1": after.canary_top1_agreement,
        "canary_seconds": after.canary_seconds - before.canary_seconds,
        **_offline(side, model, [request.prompt for request in requests], answers),
    }


def settled(server: Server) -> StoreStats:
    """The facts once nothing waits to be run again."""
    until = time.monotonic() + RUN_TIMEOUT_S
    while (stats := server.store_stats()).canary_waiting or not stats.census_current:
        if time.monotonic() > until:
            raise RuntimeError(f"after {RUN_TIMEOUT_S} s there are still {stats.canary_waiting} answers to run again")
        time.sleep(0.5)
    return stats


@torch.inference_mode()
def _offline(side: Side, model: PreTrainedModel, prompts: list[Prompt], answers: list[Answer]) -> dict[str, Any]:
    scores, in_buckets = Scores(), []
    pieces = _pieces(prompts, answers)
    for prompt, answer, cuts in zip(prompts, answers, tqdm(pieces, desc=f"{side.name}, offline"), strict=True):
        ids = torch.tensor([*prompt, *answer.output_ids], device=model.device)
        first, last = len(prompt) - 1, len(ids) - 1
        raw = model(ids[None, :last], past_key_values=DynamicCache(), logits_to_keep=last - first).logits[0]
        cache = DeltaStoreCache(model.config, side.tier, calibration=side.calibration)
        found = []
        for begin, end in pairwise(cuts):
            found = [model(ids[None, begin:end], past_key_values=cache, logits_to_keep=1).logits[0]]
        for at in range(len(prompt), last):
            found.append(model(ids[None, at : at + 1], past_key_values=cache).logits[0])
        scores.add(raw, torch.cat(found), ids[first + 1 :])
        in_buckets.append(compared(raw, *most_likely(torch.cat(found)))[0])
    metrics = scores.metrics()
    return {
        "offline_in_buckets_kl_mean": float(torch.cat(in_buckets).mean()),
        "offline_kl_mean": metrics["kl_mean"],
        "offline_kl_worst": metrics["kl_max"],
        "offline_top1": metrics["top1"],
    }


def _pieces(prompts: list[Prompt], answers: list[Answer]) -> list[list[int]]:
    """Of each prompt where the server has cut it, 0 and its end included: what was a hit had been cut before."""
    found: list[list[int]] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        hit = answer.cached_tokens
        earlier = next((cuts for other, cuts in zip(prompts, found, strict=False) if other[:hit] == prompt[:hit]), [])
        found.append([*(cut for cut in earlier if cut < hit), *([hit] if hit else [0]), len(prompt)])
    return found


def _pairs(model_folder: Path, requests: Sequence[Request], count: int, share: float) -> list[dict[str, Any]]:
    """The same requests from an empty cache again and again, in one server whose canary rests every other time: what a
    server gets by chance, a few percent, it has for its whole life. A hook that has nothing to do is in both."""
    with tempfile.TemporaryDirectory() as folder:
        rest = Path(folder) / "rests"
        environ = install(Path(folder) / "plugins", "switched") | {REST: str(rest)}
        calibration = ("--kv-compress-calibration", "none", "--kv-compress-canary", str(share))
        log_path = Path(folder) / "log"
        with serve(model_folder, (*COMMON_ARGUMENTS, *calibration), log_path=log_path, environ=environ) as server:

            def once(sampling: bool) -> Round:
                rest.unlink(missing_ok=True) if sampling else rest.touch()
                flush(server.url)
                stats, cpu_s, began_s = server.store_stats(), _cpu_s(server), time.perf_counter()
                answers = run_slice(server.url, requests, AT_ONCE)
                tokens_per_s = sum(len(answer.output_ids) for answer in answers) / (time.perf_counter() - began_s)
                return Round(tokens_per_s, _cpu_s(server) - cpu_s, stats, server.store_stats())

            once(sampling=False)  # warms up
            found = []
            for number in tqdm(range(count), desc=f"share {share:g}", unit="pair"):
                order = (True, False) if number % 2 else (False, True)
                found.append({sampling: once(sampling) for sampling in order})
    return [_pair(number, share, len(requests), pair[True], pair[False]) for number, pair in enumerate(found)]


@dataclass(frozen=True)
class Round:
    """All requests once, between two looks at the store."""

    tokens_per_s: float
    cpu_s: float
    before: StoreStats
    after: StoreStats

    def grown(self, field: str) -> float:
        grown: float = getattr(self.after, field) - getattr(self.before, field)
        return grown


def _pair(number: int, share: float, requests: int, sampling: Round, resting: Round) -> dict[str, Any]:
    waited = ("canary_sequences", "canary_waiting", "canary_overtaken")
    return {
        "part": "throughput",
        "pair": number,
        "share": share,
        "requests": requests,
        "without_tokens_per_s": resting.tokens_per_s,
        "with_tokens_per_s": sampling.tokens_per_s,
        "ratio": sampling.tokens_per_s / resting.tokens_per_s,
        "without_cpu_s": resting.cpu_s,
        "with_cpu_s": sampling.cpu_s,
        "cpu_ratio": resting.cpu_s / sampling.cpu_s,
        "sampled": sum(sampling.grown(name) for name in waited),
        "run_again": sampling.grown("canary_sequences"),
        "canary_seconds": sampling.grown("canary_seconds"),
    }


def _cpu_s(server: Server) -> float:
    """Seconds that processors have worked for all of its processes."""
    parent = psutil.Process(server.process.pid)
    times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.canary", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with tau_bench/")
    parser.add_argument("--model", help="Hugging Face folder (default: the embedded SmolLM2)")
    parser.add_argument(
        "--sides", nargs="*", default=[side.name for side in SIDES], metavar="NAME", help="default: all"
    )
    parser.add_argument("--pairs", type=int, default=12, help="of rounds, with and without (default: %(default)s)")
    parser.add_argument(
        "--shares", type=float, nargs="*", default=[0.01], metavar="SHARE", help="sampled in them (default: 0.01)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter sessions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON row a line")
    return parser


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="KL of answers against raw attention: the canary, and an offline twin")
    for name in ("side", "tokens", "canary, nats", "offline", "canary / offline", "top-1", "offline", "worst"):
        table.add_column(name, justify="left" if name == "side" else "right")
    for row in rows:
        if row["part"] == "quality":
            table.add_row(
                row["side"], f"{row['answered_tokens']:,}", f"{row['canary_kl_mean']:.3g}",
                f"{row['offline_kl_mean']:.3g}", f"{row['canary_kl_mean'] / row['offline_kl_mean']:.2f}",
                f"{row['canary_top1']:.3f}", f"{row['offline_top1']:.3f}", f"{row['canary_kl_worst']:.2g}",
            )  # fmt: skip
    Console().print(table)
    for share in sorted({row["share"] for row in rows if row["part"] == "throughput"}):
        pairs = [row for row in rows if row.get("share") == share]
        clock, cpu = (statistics.median(row[name] for row in pairs) for name in ("ratio", "cpu_ratio"))
        print(f"with {share:g} sampled: {clock:.3f} of the tokens/s without, by CPU time {cpu:.3f}; {len(pairs)} pairs")


if __name__ == "__main__":
    sys.exit(main())
