"""`deltastore calibrate`: learn a model's key statistics, and on request its layers' needs, from a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .quality_command import QualityError, load_model, model_folder, read_text

DEFAULT_TOKENS = 4096  # as calibration_text.py says, which loads torch
DEFAULT_TOTAL_TOKENS = 8192
LEAST_TOKENS = 256  # likewise; and what the layers' needs are measured on
SENSITIVITY_SEQUENCES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face folder, or the name of an embedded model")
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE",
        help="plain text like what will be served, one or several (default: the mixed text that comes with DeltaStore)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE.safetensors",
        help="where to write; unset: the user's cache, where --kv-compress-calibration auto finds it",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, metavar="T",
        help=f"of each sequence: as long as the contexts that will be served (default: {DEFAULT_TOKENS}, or the "
        "model's context where that is shorter)",
    )  # fmt: skip
    parser.add_argument(
        "--sequences", type=int, metavar="N",
        help=f"how many of each text (default: as many as {DEFAULT_TOTAL_TOKENS} tokens are)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="picks where sequences start (default: %(default)s)")
    parser.add_argument(
        "--by-layer", action="store_true",
        help=f"also deal each tier's bits out over the layers by what each loses on {LEAST_TOKENS} tokens, in hundreds "
        "of passes; contexts of some thousand tokens were measured to lose by it (default: one format for all layers)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    try:
        path = _calibrate(args)
    except QualityError as error:
        print(f"deltastore calibrate: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


def _calibrate(args: argparse.Namespace) -> Path:
    _check_sizes(args)  # before torch is loaded: a typo is found at once
    texts = [read_text(path) for path in args.text or ()]
    folder = model_folder(args.model)

    import torch
    from safetensors import SafetensorError

    from ..policy import calibration_text
    from ..policy.calibration import Calibration, CalibrationError, cached_path, fingerprint
    from .quality import sequences

    try:
        name = fingerprint(folder)
    except CalibrationError as error:
        raise QualityError(f"--model {args.model}: {error}") from error
    model, tokenizer = load_model(folder)
    count, tokens = _sizes(args, getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None))
    try:
        token_ids = [ids for text in texts for ids in sequences(tokenizer, text, count, tokens, args.seed)]
        token_ids = token_ids or calibration_text.sequences(tokenizer, count, tokens)
        with torch.inference_mode():
            layers, formats = _learn(model, [ids.to(model.device) for ids in token_ids], args.by_layer)
    except ValueError as error:
        raise QualityError(str(error)) from error
    path = args.output or cached_path(name)
    try:
        Calibration(name, layers, formats).save(path)
    except (OSError, SafetensorError) as error:
        raise QualityError(f"{path}: cannot be written ({error}); give another place with --output") from error
    return path


def _check_sizes(args: argparse.Namespace) -> None:
    if args.sequences is not None and args.sequences < 1:
        raise QualityError(f"--sequences {args.sequences}: at least 1 is needed")
    if args.tokens is not None and args.tokens < LEAST_TOKENS:
        raise QualityError(f"--tokens {args.tokens}: at least {LEAST_TOKENS} are needed")


def _sizes(args: argparse.Namespace, context_tokens: int | None) -> tuple[int, int]:
    """How many sequences, and the tokens of each. context_tokens: what the model can read, None where it does not
    say. Raises QualityError for sequences that the model cannot read."""
    if args.tokens and context_tokens and args.tokens > context_tokens:
        raise QualityError(f"--tokens {args.tokens}: the model reads at most {context_tokens}; give no more than that")
    tokens = args.tokens or min(DEFAULT_TOKENS, context_tokens or DEFAULT_TOKENS)
    return args.sequences or max(DEFAULT_TOTAL_TOKENS // tokens, 1), tokens


def _learn(model: Any, token_ids: Any, by_layer: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The layers' key bases from sequences token_ids, each [T], and each tier's formats by layer where asked for.
    Raises ValueError for a model that the cache cannot hold."""
    import torch
    from tqdm import tqdm

    from ..policy.moments import key_bases
    from ..policy.tiers import TIERS
    from .allocation import allocate
    from .collecting import collecting
    from .layer_costs import MEASURED, layer_costs
    from .support import attention_shape

    heads = attention_shape(model.config).heads_by_layer
    probe_ids = torch.stack([ids[:LEAST_TOKENS] for ids in token_ids[:SENSITIVITY_SEQUENCES]])
    probes = len(heads) * len(MEASURED) * len(probe_ids) if by_layer else 0
    with tqdm(total=len(token_ids) + probes, unit="pass", file=sys.stderr) as bar:
        bar.set_description("keys and queries")
        with collecting(model) as moments:
            for ids in token_ids:
                model.base_model(ids[None], use_cache=False)  # the base: nobody reads logits here
                bar.update()
        layers = key_bases(moments)
        if not by_layer:
            return layers, {}
        bar.set_description("each layer's needs")
        costs = layer_costs(model, layers, probe_ids, bar.update)
        packed = [tier for tier in TIERS.values() if not tier.format.is_raw]
        return layers, {tier.name: allocate(costs, heads, tier) for tier in packed}
