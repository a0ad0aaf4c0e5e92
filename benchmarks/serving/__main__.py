"""Serving against stock SGLang with the same bytes for KV: time to first token, tokens/s, what is computed and cached.

    python -m benchmarks.serving --workload airline tools --budget 0.25 --tier k4v2 --quick --data FOLDER

Servers side by side: stock SGLang, DeltaStore with raw pages (what its attention path brings) and DeltaStore with each
`--tier` (what compression brings). `--budget` is the share of the workload's distinct tokens that the KV bytes would
hold in 16 bits. `--workload c3` is another measurement: what sharing stores (see `sharing`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance, write_rows
from sglang_deltastore.host import model_path
from sglang_deltastore.policy.tiers import SERVED_TIERS

from . import offline, report, runner, sharing
from .case import Case
from .plot import draw
from .workloads import WORKLOADS, Sizes, Texts, build

C3 = "c3"
#: aimed at 4 minutes for three sides at a quarter of the working set, on 2 cores
QUICK = {
    "airline": Sizes(sessions=8, turns=10, context_tokens=2048, system_tokens=512, answer_tokens=4),
    "tools": Sizes(sessions=10, turns=4, context_tokens=1152, system_tokens=896, answer_tokens=4),
    "branches": Sizes(sessions=16, turns=6, context_tokens=768, system_tokens=512, answer_tokens=4),
    "fleet": Sizes(sessions=12, turns=4, context_tokens=1024, system_tokens=512, answer_tokens=4),
    "mooncake": Sizes(sessions=12, turns=5, context_tokens=1536, system_tokens=512, answer_tokens=4),
}
#: 5 to 15 minutes each
FULL = {
    "airline": Sizes(sessions=10, turns=20, context_tokens=4096, system_tokens=1024, answer_tokens=8),
    "tools": Sizes(sessions=18, turns=5, context_tokens=1280, system_tokens=1024, answer_tokens=8),
    "branches": Sizes(sessions=24, turns=6, context_tokens=1024, system_tokens=512, answer_tokens=8),
    "fleet": Sizes(sessions=16, turns=5, context_tokens=1536, system_tokens=768, answer_tokens=8),
    "mooncake": Sizes(sessions=24, turns=5, context_tokens=2048, system_tokens=512, answer_tokens=8),
}


def main() -> int:
    arguments = _parser().parse_args()
    model = arguments.model or str(model_path())
    texts = Texts(arguments.data, model)
    rows: list[dict[str, Any]] = []
    try:
        for name in arguments.workload:
            for found in _shared(arguments, texts, model) if name == C3 else _served(name, arguments, texts, model):
                rows += [{**row, **provenance()} for row in found]
                if arguments.json:
                    write_rows(arguments.json, rows)  # after each run: all of them take an hour
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    text = report.markdown(rows)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.plot:
        draw(rows, arguments.plot)
    return 0


def _served(name: str, arguments: argparse.Namespace, texts: Texts, model: str) -> Iterator[list[dict[str, Any]]]:
    """A workload's rows, budget by budget."""
    sizes = _sizes(name, arguments)
    requests = build(name, texts, sizes, arguments.seed)
    compare = offline.compare if arguments.offline else runner.compare
    for share in arguments.budget:
        case = Case(
            requests, model, arguments.tier, share, arguments.concurrency, arguments.calibration, arguments.host
        )
        print(f"{name}, budget {share:g}: {len(requests)} requests on each side", file=sys.stderr)
        with _logs(arguments, f"{name}-{share:g}") as folder:
            found = compare(case, Path(folder))
        yield [{**row, "workload": name, "sizes": vars(sizes), "seed": arguments.seed} for row in found]


def _shared(arguments: argparse.Namespace, texts: Texts, model: str) -> Iterator[list[dict[str, Any]]]:
    if len(arguments.tier) > 1:
        raise ValueError(f"--tier {' '.join(arguments.tier)}: --workload c3 measures one tier; give one")
    transcripts = {
        name: build(name, texts, replace(QUICK[name], answer_tokens=1), arguments.seed) for name in sharing.TRANSCRIPTS
    }
    with _logs(arguments, C3) as folder:
        yield sharing.measure(texts, transcripts, model, arguments.tier[0], Path(folder), arguments.quick)


def _logs(arguments: argparse.Namespace, name: str) -> AbstractContextManager[str]:
    """Where the servers' logs go: a folder to keep, or one that is deleted."""
    if arguments.logs is None:
        return tempfile.TemporaryDirectory()
    folder = arguments.logs / name
    folder.mkdir(parents=True, exist_ok=True)
    return nullcontext(str(folder))


def _sizes(name: str, arguments: argparse.Namespace) -> Sizes:
    preset = (QUICK if arguments.quick else FULL)[name]
    own = {field: getattr(arguments, field) for field in vars(preset) if getattr(arguments, field) is not None}
    return replace(preset, **own)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 2:
        raise argparse.ArgumentTypeError(f"{text}: a share of the working set, more than 0 and at most 2, is wanted")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workload", nargs="+", required=True, choices=[*WORKLOADS, C3], metavar="NAME")
    parser.add_argument(
        "--budget", nargs="+", type=_share, default=[0.25], metavar="SHARE", help="of the working set (default: 0.25)"
    )
    parser.add_argument(
        "--host", type=_share, default=0, metavar="SHARE",
        help="each tier once more with host memory for so much of the working set in 16 bits (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--tier", nargs="+", default=["k4v2"], choices=SERVED_TIERS, metavar="NAME", help="default: k4v2"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with tau_bench/, bfcl/, chat/, ...")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter sessions: 3 to 5 minutes a workload")
    parser.add_argument("--offline", action="store_true", help="through sglang.Engine, without HTTP: tokens/s alone")
    parser.add_argument("--model", help="Hugging Face folder (default: the embedded SmolLM2)")
    parser.add_argument(
        "--calibration", default="none", metavar="FILE|none|auto", help="as --kv-compress-calibration (default: none)"
    )
    parser.add_argument("--concurrency", type=int, default=2, help="requests at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of sessions and their order (default: 0)")
    sizes = parser.add_argument_group("other sizes than those of --quick, or of the full set")
    for name in Sizes.__dataclass_fields__:
        sizes.add_argument("--" + name.replace("_", "-"), type=int, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON row a line")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the picture")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the servers' logs there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
