"""`deltastore calibrate`: learn a model's key statistics and its layers' needs from a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .command import QualityError, load_model, model_folder, read_text

SENSITIVITY_SEQUENCES = 2
SENSITIVITY_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face folder, or the name of an embedded model")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="plain text like what will be served")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE.safetensors",
        help="where to write; unset: the user's cache, where --kv-compress-calibration auto finds it",
    )  # fmt: skip
    parser.add_argument("--sequences", type=int, default=16, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, metavar="T", help="of each sequence (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="picks where sequences start (default: %(default)s)")
    parser.add_argument(
        "--uniform", action="store_true", help="one format for all layers: skip measuring what each layer needs"
    )


def run(args: argparse.Namespace) -> int:
    try:
        path = _calibrate(args)
    except QualityError as error:
        print(f"deltastore calibrate: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


def _calibrate(args: argparse.Namespace) -> Path:
    if args.sequences < 1 or args.tokens < SENSITIVITY_TOKENS:
        raise QualityError(
            f"--sequences {args.sequences} --tokens {args.tokens}: at least 1 of {SENSITIVITY_TOKENS} is needed"
        )
    text = read_text(args.text)
    folder = model_folder(args.model)

    import torch
    from tqdm import tqdm

    from ..calibration import Calibration, CalibrationError, cached_path, fingerprint
    from ..tiers import TIERS
    from .allocation import MEASURED, allocate, layer_costs
    from .moments import collecting
    from .quality import sequences
    from .support import attention_shape

    try:
        name = fingerprint(folder)
    except CalibrationError as error:
        raise QualityError(f"--model {args.model}: {error}") from error
    model, tokenizer = load_model(folder)
    try:
        heads = attention_shape(model.config).heads_by_layer
        token_ids = sequences(tokenizer, text, args.sequences, args.tokens, args.seed)
    except ValueError as error:
        raise QualityError(str(error)) from error

    probes = 0 if args.uniform else len(heads) * len(MEASURED) * SENSITIVITY_SEQUENCES
    with tqdm(total=len(token_ids) + probes, unit="pass", file=sys.stderr) as bar:
        bar.set_description("keys and queries")
        with collecting(model) as moments, torch.inference_mode():
            for ids in token_ids:
                model(ids[None], use_cache=False)
                bar.update()
        layers = tuple(layer.key_basis() for layer in moments)
        formats = {}
        if probes:
            bar.set_description("each layer's needs")
            probe_ids = token_ids[:SENSITIVITY_SEQUENCES, :SENSITIVITY_TOKENS]
            costs = layer_costs(model, layers, probe_ids, bar.update)
            packed = [tier for tier in TIERS.values() if not tier.format.is_raw]
            formats = {tier.name: allocate(costs, heads, tier) for tier in packed}
    path = args.output or cached_path(name)
    Calibration(name, layers, formats).save(path)
    return path
