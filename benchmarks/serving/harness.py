"""EleutherAI's lm-evaluation-harness asks stock's server and ours the same PIQA questions.

    make results-harness DATA=folder

The harness (`lm_eval`, model local-completions) wants the log-probabilities of whole prompts, and SGLang finds no
prefix for such a request: a prompt that fits one chunk is computed raw, and would say nothing of a compressed cache. So
prompts have solved questions in front, and our servers compute them in chunks (`--chunked-prefill-size`), each of which
reads those before it packed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance, write_rows
from benchmarks.serving.parity import AT_ONCE, COMMON_ARGUMENTS, STOCK_ARGUMENTS
from benchmarks.serving.sides import STOCK, names_among
from sglang_deltastore.host import model_path
from sglang_deltastore.host.server_process import serve
from sglang_deltastore.lab.downstream.data import read_data
from sglang_deltastore.policy.tiers import TIERS

TASK = "piqa_rows"
CHUNK_TOKENS, SHOTS = 64, 5


def main() -> int:
    arguments = _parser().parse_args()
    model = Path(arguments.model or model_path())
    questions = read_data([arguments.piqa]).piqa_rows
    if not 2 <= arguments.items <= len(questions) - SHOTS:
        raise SystemExit(
            f"--items {arguments.items} of --piqa {arguments.piqa}: allowed is 2 to {len(questions) - SHOTS}: it has "
            f"{len(questions)} rows of PIQA, and {SHOTS} are shown solved"
        )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), questions, arguments.items)
        stock: list[dict[str, Any]] = []
        for side in (STOCK, *arguments.tiers):
            calibration = ("--kv-compress-calibration", arguments.calibration)
            ours = ("--kv-compress", "deltastore", "--chunked-prefill-size", str(CHUNK_TOKENS), *calibration)
            options = STOCK_ARGUMENTS if side == STOCK else (*ours, "--kv-compress-tier", side)
            with serve(model, (*COMMON_ARGUMENTS, *options), log_path=Path(folder) / "server.log") as server:
                samples = asked(arguments.lm_eval, server.url, model, Path(folder), Path(folder) / side)
            stock = stock or samples
            about = {"side": side, "calibration": "" if side == STOCK else arguments.calibration, "shots": SHOTS}
            rows.append({**about, **compared(samples, stock), "model": model.name, **provenance()})
            if arguments.json:
                write_rows(arguments.json, rows)
    _print(rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.harness", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--piqa", type=Path, required=True, metavar="FILE", help="rows {goal, sol1, sol2, label}")
    parser.add_argument("--items", type=int, default=100, help="questions that are asked (default: %(default)s)")
    parser.add_argument("--model", default=None, help="Hugging Face folder (default: the embedded SmolLM2)")
    parser.add_argument(
        "--tiers",
        type=names_among(TIERS),
        default="lossless,conservative",
        help="comma-separated (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration", default="auto", metavar="FILE|none|auto", help="as --kv-compress-calibration (default: auto)"
    )
    parser.add_argument(
        "--lm-eval",
        default="lm_eval",
        metavar="PROGRAM",
        help="its command line, of any environment (default: lm_eval)",
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write one JSON row a line")
    return parser


def write_task(folder: Path, questions: Sequence[dict[str, Any]], items: int) -> None:
    """A task of the harness: the first `items` questions, behind solved ones of the others."""
    for name, part in (("asked", questions[:items]), ("solved", questions[items:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(folder / "asked.jsonl"), "train": str(folder / "solved.jsonl")}
        },
        "output_type": "multiple_choice",
        "training_split": "train",
        "validation_split": "validation",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    (folder / f"{TASK}.yaml").write_text(json.dumps(task))  # JSON is YAML


def asked(lm_eval: str, url: str, model: Path, tasks: Path, out: Path) -> list[dict[str, Any]]:
    """The harness's own record of each question. Raises CalledProcessError with what it said."""
    given = f"model={model},tokenizer={model},base_url={url}/v1/completions,num_concurrent={AT_ONCE}"
    subprocess.run(
        [
            lm_eval, "--model", "local-completions", "--model_args", f"{given},tokenized_requests=True",
            "--include_path", str(tasks), "--tasks", TASK, "--num_fewshot", str(SHOTS),
            "--output_path", str(out), "--log_samples",
        ],
        check=True, stdout=sys.stderr,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "cache")},
    )  # fmt: skip
    (found,) = out.rglob(f"samples_{TASK}_*.jsonl")
    return sorted((json.loads(line) for line in found.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def compared(samples: Sequence[dict[str, Any]], stock: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies with their standard errors, as the harness has them, and how far single answers are from stock's."""
    pairs = list(zip(samples, stock, strict=True))
    off = [
        abs(ours - theirs)
        for sample, judge in pairs
        for ours, theirs in zip(log_probabilities(sample), log_probabilities(judge), strict=True)
    ]
    row: dict[str, Any] = {"items": len(samples)}
    for metric in ("acc", "acc_norm"):
        right = [sample[metric] for sample in samples]
        row[metric] = statistics.fmean(right)
        row[f"{metric}_stderr"] = statistics.stdev(right) / len(right) ** 0.5
        row[f"{metric}_as_stock"] = statistics.fmean(sample[metric] == judge[metric] for sample, judge in pairs)
    return {**row, "mean_difference_nats": statistics.fmean(off), "largest_difference_nats": max(off)}


def log_probabilities(sample: dict[str, Any]) -> list[float]:
    """Of each choice, all of its tokens."""
    return [float(answer[0]) for answer in sample["filtered_resps"]]


def _print(rows: Sequence[dict[str, Any]]) -> None:
    shown = Table(title="lm-evaluation-harness, PIQA")
    for name in ("server", "acc", "acc_norm", "as stock", "mean |difference| of a choice, nats"):
        shown.add_column(name)
    for row in rows:
        accuracies = [f"{row[name]:.3f} ± {row[f'{name}_stderr']:.3f}" for name in ("acc", "acc_norm")]
        shown.add_row(row["side"], *accuracies, f"{row['acc_norm_as_stock']:.1%}", f"{row['mean_difference_nats']:.3f}")
    Console().print(shown)


if __name__ == "__main__":
    raise SystemExit(main())
