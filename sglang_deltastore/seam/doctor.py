"""`deltastore doctor`: what will run on this machine, and why."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deltastore_kernels import native

from ..host import activate, cpu_dtype, cpu_flags, needs_cpu_engine, needs_standin
from ..policy import calibration, refusals


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `advice` says what to do where it is not well."""

    what: str
    well: bool
    found: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="also check this Hugging Face folder")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    findings = [_version(), _device(), _dtype(), _sgl_kernel(), _kernels()]
    if args.model:
        findings += [_model(args.model), _tokenizer(args.model), _calibration(args.model)]
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
    return 0 if all(finding.well for finding in findings) else 1


def _print(findings: list[Finding]) -> None:
    table = Table("", "looked at", "found", "what to do")
    for finding in findings:
        mark = "[green]ok[/green]" if finding.well else "[red]no[/red]"
        table.add_row(mark, finding.what, finding.found, finding.advice)
    Console().print(table)


def _checked(what: str, found: str, check: Callable[[], None]) -> Finding:
    """A finding from a check that raises ValueError with the advice in it."""
    try:
        check()
    except ValueError as refusal:
        return Finding(what, False, found, str(refusal))
    return Finding(what, True, found)


def _version() -> Finding:
    return _checked("SGLang version", version("sglang"), refusals.check_version)


def _device() -> Finding:
    if needs_cpu_engine():
        switched = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
        return Finding("device", True, "no GPU: the CPU", "" if switched else 'first run: eval "$(deltastore env)"')
    return Finding("device", True, "a GPU", "our kernels have never run on one: run make test-gpu, or add --device cpu")


def _dtype() -> Finding:
    if needs_cpu_engine() and (wanted := cpu_dtype(cpu_flags())) != "auto":
        return Finding("dtype", True, "this CPU has no bfloat16 instructions", f"serve with --dtype {wanted}")
    return Finding("dtype", True, "the model's own")


def _sgl_kernel() -> Finding:
    if needs_standin():
        return Finding("sgl_kernel", True, "cannot load here; DeltaStore's stand-in takes its place on the CPU")
    return Finding("sgl_kernel", True, "loads, or is not needed")


def _kernels() -> Finding:
    if native.available():
        return Finding("kernels", True, f"compiled for this CPU: {native.isa()}")
    return Finding("kernels", True, "plain torch alone: right, but slow", native.BUILD)


def _calibration(path: str) -> Finding:
    try:
        found = calibration.resolve(calibration.AUTO, Path(path))
    except calibration.CalibrationError as error:
        return Finding("calibration", False, "cannot be used", str(error))
    if found is None:
        return Finding("calibration", True, "none for this model yet", "its first server will make one")
    if found.formats:
        return Finding(
            "calibration", True, f"{len(found.layers)} layers; bits dealt out by layer: {', '.join(found.formats)}",
            "contexts of some thousand tokens were measured to lose by that; one format for all layers: deltastore "
            f"calibrate --model {path}",
        )  # fmt: skip
    return Finding("calibration", True, f"{len(found.layers)} layers, one format for all")


def _tokenizer(path: str) -> Finding:
    activate()
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    try:
        tokenizer = get_tokenizer(path)
    except Exception as error:  # tokenizers raise whatever they meet in a file that is missing or broken
        reason = " ".join(str(error).split())[:200]
        return Finding(
            "tokenizer", False, f"cannot be loaded: {reason}",
            f"put the tokenizer's files into {path}, or serve token ids alone with --skip-tokenizer-init",
        )  # fmt: skip
    return Finding("tokenizer", True, f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens")


def _model(path: str) -> Finding:
    activate()
    from sglang.srt.configs.model_config import ModelConfig

    model_config = ModelConfig(path)
    found = (
        f"{model_config.num_hidden_layers} layers, {model_config.get_total_num_kv_heads()} KV heads "
        f"of {model_config.head_dim}"
    )
    return _checked(
        f"model {path}", found, lambda: refusals.check_model(model_config, keeps_states=not needs_cpu_engine())
    )
