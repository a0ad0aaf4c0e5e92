"""`deltastore calibrate`: learn a model's key statistics, and on request its layers' needs, from a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .quality_command import QualityError, load_model, model_folder, read_text

DEFAULT_TOKENS = 1024  # as calibration_text.py says, which loads torch
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
        help=f"of each sequence (default: {DEFAULT_TOKENS}, or the context where that is shorter)",
    )  # fmt: skip
    parser.add_argument(
        "--context-length", type=int, metavar="T",
        help="of the longest contexts that will be served: sequences are read as if they lay all over it (default: the "
        "model's)",
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
    text_config = model.config.get_text_config(decoder=True)
    count, tokens, context_tokens = _sizes(args, getattr(text_config, "max_position_embeddings", None))
    try:
        # In turn: each text lies all over the context.
        by_text = (sequences(tokenizer, text, count, tokens, args.seed) for text in texts)
        token_ids = [ids for turn in zip(*by_text, strict=True) for ids in turn]
        token_ids = token_ids or calibration_text.sequences(tokenizer, count, tokens)
        with torch.inference_mode():
            firsts = calibration_text.first_positions(len(token_ids), tokens, context_tokens)
            layers, formats = _learn(model, [ids.to(model.device) for ids in token_ids], firsts, args.by_layer)
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
    for option, given in (("--tokens", args.tokens), ("--context-length", args.context_length)):
        if given is not None and given < LEAST_TOKENS:
            raise QualityError(f"{option} {given}: at least {LEAST_TOKENS} are needed")


def _sizes(args: argparse.Namespace, context_tokens: int | None) -> tuple[int, int, int | None]:
    """How many sequences, the tokens of each, and of the context that they lie all over. context_tokens: what the model
    can read, None where it does not say. Raises QualityError for what the model cannot read."""
    for option, given in (("--tokens", args.tokens), ("--context-length", args.context_length)):
        if given and context_tokens and given > context_tokens:
            raise QualityError(f"{option} {given}: the model reads at most {context_tokens}; give no more than that")
    context_tokens = args.context_length or context_tokens
    tokens = args.tokens or min(DEFAULT_TOKENS, context_tokens or DEFAULT_TOKENS)
    return args.sequences or max(DEFAULT_TOTAL_TOKENS // tokens, 1), tokens, context_tokens


def _learn(
    model: Any, token_ids: Any, first_positions: list[int], by_layer: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The layers' key bases from sequences token_ids, each [T], that begin at first_positions; and each tier's formats
    by layer where asked for. Raises ValueError for a model that the cache cannot hold."""
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
            for ids, first in zip(token_ids, first_positions, strict=True):
                # A model without positions takes none, and knows no end of its context.
                at = {"position_ids": torch.arange(first, first + len(ids), device=ids.device)[None]} if first else {}
                model.base_model(ids[None], **at, use_cache=False)  # the base: nobody reads logits here
                bar.update()
        layers = key_bases(moments)
        if not by_layer:
            return layers, {}
        bar.set_description("each layer's needs")
        costs = layer_costs(model, layers, probe_ids, bar.update)
        packed = [tier for tier in TIERS.values() if not tier.format.is_raw]
        return layers, {tier.name: allocate(costs, heads, tier) for tier in packed}
