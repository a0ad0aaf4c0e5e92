"""What pages of two levels bring at equal bytes: prompt tokens computed, and what compression cost the answers.

    python -m benchmarks.serving.adaptive --data FOLDER --json FILE

For each workload and budget (the share of its distinct tokens that the KV bytes would hold in 16 bits) a server of each
tier answers the same requests, one after the other, and runs every one of them again with raw attention: the canary's
KL over each answer's tokens, given the same tokens before it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.provenance import provenance, write_rows
from sglang_deltastore.host import model_path
from sglang_deltastore.host.server_process import serve
from sglang_deltastore.policy.tiers import SERVED_TIERS

from .canary import COMMON_ARGUMENTS, settled
from .canary_plugins import install
from .case import Case
from .client import ask, flush
from .sides import Geometry, Side, check_bytes, check_holds, names_among, sides
from .workloads import Sizes, Texts, build

SIZES = {
    "airline": Sizes(sessions=8, turns=5, context_tokens=1280, system_tokens=512, answer_tokens=16),
    "tools": Sizes(sessions=10, turns=4, context_tokens=1152, system_tokens=896, answer_tokens=16),
    "fleet": Sizes(sessions=12, turns=4, context_tokens=1024, system_tokens=512, answer_tokens=16),
}
TIERS = ("lossless", "k4v2", "conservative", "adaptive")
RUNNING = 1


def main() -> int:
    arguments = _parser().parse_args()
    model = arguments.model or str(model_path())
    texts = Texts(arguments.data, model)
    rows: list[dict[str, Any]] = []
    requests_of = {workload: build(workload, texts, SIZES[workload]) for workload in arguments.workloads}
    for share, (workload, requests) in product(arguments.budgets, requests_of.items()):
        case = Case(requests, model, arguments.tiers, share, RUNNING, calibration="auto")
        for side in _sides(case):
            found = {**case.row(side), **_served(case, side, f"{workload}, {share:g}")}
            rows.append({"benchmark": "adaptive", "workload": workload, **found, **provenance()})
            if arguments.json:
                write_rows(arguments.json, rows)
    _print(rows)
    return 0


def _sides(case: Case) -> list[Side]:
    """Of the case's tiers alone: the others need not hold a request."""
    geometry = Geometry.of(case.model)
    found = sides(geometry, case.tiers, case.budget_bytes, case.running, case.calibration)
    ours = [side for side in found if side.name in case.tiers]
    check_holds(ours, max(len(request.prompt) + request.answer_tokens for request in case.requests))
    return ours


def _served(case: Case, side: Side, title: str) -> dict[str, Any]:
    """All requests of a case through one server."""
    with tempfile.TemporaryDirectory() as folder:
        environ = install(Path(folder) / "plugins", "uncapped")
        options = (*COMMON_ARGUMENTS, *side.arguments(), "--kv-compress-canary", "1")
        with serve(case.model, options, log_path=Path(folder) / "log", environ=environ) as server:
            check_bytes(side, server, case.budget_bytes)
            flush(server.url)
            before = settled(server)
            progress = tqdm(case.requests, desc=f"{title}, {side.name}")
            answers = [ask(server.url, request.prompt, request.answer_tokens) for request in progress]
            after = settled(server)

    def grown(field: str) -> float:
        difference: float = getattr(after, field) - getattr(before, field)
        return difference

    tokens = grown("canary_tokens")
    if tokens != sum(len(answer.output_ids) for answer in answers) or after.accounting_errors:
        raise RuntimeError(f"{side.name}: not every answer was compared, or pages do not add up: {after}")
    return {
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "computed_tokens": sum(answer.computed_tokens for answer in answers),
        "answered_tokens": tokens,
        "kl_mean": grown("canary_kl_nats") / tokens,
        "kl_worst": after.canary_kl_worst,
        "top1": after.canary_top1_agreement,
        **{name: grown(name) for name in ("hit_tokens", "hit_coarse_tokens", "evicted_tokens", "demoted_tokens")},
        "demotion_seconds": grown("demotion_seconds"),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="The same bytes at one level, and at two")
    for name in ("workload", "budget", "tier", "computed", "KL, nats", "same top token", "hits coarse", "evicted"):
        table.add_column(name, justify="left" if name in ("workload", "tier") else "right")
    for row in rows:
        table.add_row(
            row["workload"], f"{row['budget_share']:g}", row["side"], f"{row['computed_tokens']:,}",
            f"{row['kl_mean']:.2g}", f"{row['top1']:.1%}", f"{row['hit_coarse_tokens'] / row['hit_tokens']:.0%}",
            f"{row['evicted_tokens']:,}",
        )  # fmt: skip
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.adaptive", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with tau_bench/, bfcl/")
    parser.add_argument("--model", help="Hugging Face folder (default: the embedded SmolLM2)")
    parser.add_argument(
        "--workloads", type=names_among(SIZES), default=list(SIZES), metavar="NAMES", help="default: all"
    )
    parser.add_argument(
        "--tiers", type=names_among(SERVED_TIERS), default=list(TIERS), metavar="NAMES",
        help=f"default: {','.join(TIERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.1, 0.25], metavar="SHARE", help="default: 0.1 0.25"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON row a line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
