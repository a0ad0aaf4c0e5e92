"""`deltastore quality`: what each configuration costs a model's predictions, and how many bytes it takes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

AUTO, NONE = "auto", "none"  # as calibration.py says, which loads torch
SUITE_NAMES = ("tiers", "claims", "peers", "ablations", "trellis")
LEAST_TOKENS = 64
_COLUMNS = (
    ("protocol", "protocol", "{}"),
    ("source", "source", "{}"),
    ("config", "config", "{}"),
    ("bits", "bits_per_value", "{:.2f}"),
    ("ratio", "ratio", "{:.2f}"),
    ("KL mean", "kl_mean", "{:.4f}"),
    ("median", "kl_median", "{:.4f}"),
    ("99.9%", "kl_p999", "{:.3f}"),
    ("max", "kl_max", "{:.3f}"),
    ("top-1", "top1", "{:.3f}"),
    ("ppl before", "ppl_base", "{:.3f}"),
    ("ppl", "ppl", "{:.3f}"),
    ("grade", "grade", "{}"),
)


class QualityError(RuntimeError):
    """The user's input cannot be measured; the message says what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face folder, or the name of an embedded model")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="plain text to measure on")
    parser.add_argument("--suite", default="tiers", help=f"{', '.join(SUITE_NAMES)} (default: %(default)s)")
    parser.add_argument("--protocol", default="both", choices=("all", "continue", "both"))
    parser.add_argument("--sequences", type=int, default=5, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, metavar="T", help="of each sequence (default: %(default)s)")
    parser.add_argument(
        "--new-tokens", type=int, metavar="N",
        help="of each sequence, the last ones: protocol continue stores what is before them (default: half)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="picks where sequences start (default: %(default)s)")
    parser.add_argument(
        "--calibration", default=AUTO, metavar=f"FILE|{NONE}|{AUTO}",
        help="of the model, by deltastore calibrate; auto: the user's cache (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one row a line")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw KL against ratio")


def run(args: argparse.Namespace) -> int:
    try:
        rows = _measure(args)
        _write(args, rows)
    except QualityError as error:
        print(f"deltastore quality: {error}", file=sys.stderr)
        return 1
    return 0


def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, with model, text and provenance."""
    text = _checked_text(args)  # before torch is loaded: a typo is found at once
    folder = model_folder(args.model)
    import torch
    from tqdm import tqdm

    from ..policy.calibration import CalibrationError, resolve
    from .provenance import provenance
    from .quality import PROTOCOLS, measure, passes, sequences
    from .suites import SUITES, Subject

    try:
        model, tokenizer = load_model(folder)
        try:
            calibration = resolve(args.calibration, folder)
        except CalibrationError as error:
            raise QualityError(str(error)) from error
        try:
            token_ids = sequences(tokenizer, text, args.sequences, args.tokens, args.seed)
        except ValueError as error:
            raise QualityError(f"--text {args.text}: {error}") from error
        subject = Subject(model, token_ids, calibration)
        protocols = PROTOCOLS if args.protocol == "both" else (args.protocol,)
        candidates = _supported(SUITES[args.suite], subject)
        for left_out in (c.name for c in candidates if not set(c.protocols) & set(protocols)):
            print(f"left out, since it evicts and needs --protocol continue: {left_out}", file=sys.stderr)
        total = passes(candidates, protocols) * len(token_ids)
        with tqdm(total=total, unit="pass", file=sys.stderr) as bar:

            def tick(name: str) -> None:
                bar.set_description(name[:32].ljust(32))
                bar.update()

            rows = measure(model, token_ids, candidates, protocols, tick, args.new_tokens)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise QualityError(_out_of_memory(args)) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise QualityError(_out_of_memory(args)) from error
        raise
    source = {
        "model": _model_name(folder),
        "text": args.text.name,
        "sequences": len(token_ids),
        "tokens": args.tokens,
        "new_tokens": args.new_tokens or args.tokens - args.tokens // 2,
        "seed": args.seed,
        "suite": args.suite,
    }
    return [{**source, **row, **provenance(model.device.type)} for row in rows]


def _checked_text(args: argparse.Namespace) -> str:
    """The text; raises QualityError for whatever can be seen to be wrong without the model."""
    if args.suite not in SUITE_NAMES:
        raise QualityError(f"--suite {args.suite}: unknown; known are {', '.join(SUITE_NAMES)}")
    if args.sequences < 1:
        raise QualityError(f"--sequences {args.sequences}: at least 1 is needed")
    if args.tokens < LEAST_TOKENS:
        raise QualityError(f"--tokens {args.tokens}: at least {LEAST_TOKENS} are needed, since scores begin at 32")
    if args.new_tokens is not None and not 1 <= args.new_tokens < args.tokens:
        raise QualityError(f"--new-tokens {args.new_tokens}: at least 1, and fewer than --tokens {args.tokens}")
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        check_folder(option, path)
    return read_text(args.text)


def check_folder(option: str, path: Path | None) -> None:
    """Raises QualityError where `path` could not be written."""
    if path and not path.absolute().parent.is_dir():
        raise QualityError(f"{option} {path}: there is no folder {path.absolute().parent}; make it first")


def read_text(path: Path) -> str:
    """The file's text; raises QualityError when there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QualityError(f"--text {path}: cannot be read as UTF-8 text ({error}); give a text file") from error
    if not text.strip():
        raise QualityError(f"--text {path}: the file is empty; give one with some thousand words")
    return text


def model_folder(name: str) -> Path:
    from ..host.models import MODELS, ModelError, model_path

    if name in MODELS:
        try:
            return model_path(name)
        except ModelError as error:
            raise QualityError(f"--model {name}: {error}") from error
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise QualityError(
            f"--model {name}: no folder with a config.json; give a Hugging Face folder, or one of {', '.join(MODELS)}"
        )
    return folder


def _model_name(folder: Path) -> str:
    from ..host.models import MODELS

    return next((name for name, model in MODELS.items() if model.folder_name == folder.name), folder.resolve().name)


def load_model(folder: Path, dtype: str = "float32") -> tuple[Any, Any]:
    """(model, tokenizer); raises QualityError when the folder is no causal language model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from .attention import ATTENTION

    logging.disable_progress_bar()  # ours is the one bar
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=getattr(torch, dtype), attn_implementation=ATTENTION
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise QualityError(
            f"--model {folder}: not a causal language model that transformers loads: {reason}"
        ) from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _supported(suite: Any, subject: Any) -> list[Any]:
    """The suite's candidates; raises QualityError for a model that our cache cannot hold."""
    from .support import attention_shape

    try:
        attention_shape(subject.model.config)
    except ValueError as error:
        raise QualityError(f"--model: {error}") from error
    return suite(subject)


def _out_of_memory(args: argparse.Namespace) -> str:
    return (
        f"out of memory with --tokens {args.tokens}: the logits of one sequence are held; "
        "lower --tokens, or use a smaller model"
    )


def _write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    print(markdown(rows))
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.plot:
        from .plot import pareto

        pareto(rows, f"{rows[0]['model']}, {rows[0]['text']}", args.plot)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table, rows of a protocol by ratio."""
    lines = [[title for title, _, _ in _COLUMNS], ["---"] * len(_COLUMNS)]
    for row in sorted(rows, key=lambda row: (row["protocol"], row["ratio"])):
        lines.append([form.format(row[key]) for _, key, form in _COLUMNS])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
