"""The first start with a model: a text goes through it as SGLang has loaded it, and what its attention saw is kept.

It happens when the weights are there and the memory for KV is not yet given out, on every rank for its own heads. The
first rank fits the bases, writes them to the user's cache for all later starts, and hands them to the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from sglang.srt.distributed import get_tp_group
from tqdm import tqdm

from ..policy.calibration import Calibration, CalibrationError, cached
from ..policy.calibration_text import TOKENS, first_positions, sequences
from ..policy.moments import Moments, joined, key_bases
from .raw_pass import RawAttention, run_raw
from .scoring import window_of

logger = logging.getLogger(__name__)

SEQUENCES, SEQUENCES_ON_CPU = 24, 8
"""All of the shipped text, and what two cores read in less than a minute through a model of 135M parameters."""


class _Observing(RawAttention):
    """Adds the sequence's queries and keys to the layers' moments."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.moments = {layer.layer_id: Moments(is_capped=bool(layer.logit_cap)) for layer in layers}

    def saw(self, layer: Any, query: torch.Tensor, key: torch.Tensor) -> None:
        self.moments[layer.layer_id].add(query, key)


def calibrate_once(
    kvc: Any, layers: Sequence[Any], fingerprint: str, path: Path | None, text: str | None
) -> tuple[Calibration | None, str]:
    """All heads' calibration, on every rank the same, and in words where it comes from: what `path` has, else made
    now and left there. path None: nobody could find it again.

    text None: the shipped one. A text of the user's that cannot be used raises CalibrationError; whatever else fails
    is said in the log, and the server goes on without.
    """
    group = get_tp_group()
    first = group.rank_in_group == 0
    with _one_at_a_time(path if first else None):
        found = _everywhere(group, cached(path) if first and path else None)
        if found is not None:
            return found, str(path)
        if first:
            later = f"later starts read {path}" if path else "not kept, because the model's files were not found"
            logger.info("DeltaStore: calibrates itself for this model, once; %s", later)
        began = time.perf_counter()
        try:
            made = _calibrated(kvc, layers, fingerprint, text, group)
        except CalibrationError:
            raise
        except Exception:
            logger.warning("DeltaStore: could not calibrate; serves without, and loses more by it", exc_info=True)
            made = None
        if made is None:
            return None, "none, because calibrating failed"
        if first:
            logger.info("DeltaStore: calibrated in %.0f s", time.perf_counter() - began)
            if path and _saved(made, path):
                return made, str(path)
        return made, "made at this start, and not kept"


@contextmanager
def _one_at_a_time(path: Path | None) -> Iterator[None]:
    """Servers that start together calibrate once. A folder that cannot be written to keeps nobody from starting."""
    lock = None
    if path is not None and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("DeltaStore: waits for another server that calibrates for this model")
                lock.acquire()
        except OSError as error:
            logger.warning("DeltaStore: %s cannot be written to (%s); nothing is kept", path.parent, error)
            lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _everywhere(group: Any, value: Any) -> Any:
    """The first rank's value, on all ranks."""
    return value if group.world_size == 1 else group.broadcast_object(value, src=0)


def _calibrated(kvc: Any, layers: Sequence[Any], fingerprint: str, text: str | None, group: Any) -> Calibration | None:
    moments = observe(kvc, layers, text)
    if kvc.device != "cpu":
        torch.get_device_module(kvc.device).empty_cache()
    replicas = [_replicas(kvc.model_config, layer, group.world_size) for layer in layers]
    by_rank = _at_the_first(group, moments)
    return _everywhere(group, _fitted(by_rank, replicas, fingerprint) if by_rank else None)


def _replicas(model_config: Any, layer: Any, ranks: int) -> int:
    """How many ranks have the same KV head of a layer: more than one where there are fewer heads than ranks."""
    has_window = window_of(layer) is not None
    total_heads = model_config.get_swa_num_kv_heads(1) if has_window else model_config.get_total_num_kv_heads()
    return max(ranks * layer.tp_k_head_num // total_heads, 1)


def _fitted(by_rank: list[list[Moments]], replicas: list[int], fingerprint: str) -> Calibration | None:
    """replicas: of each layer. None where it cannot be done: the other ranks wait for an answer, so nothing is
    raised."""
    try:
        by_layer = zip(zip(*by_rank, strict=True), replicas, strict=True)
        bases = key_bases([joined(of_layer, each) for of_layer, each in by_layer])
        return Calibration(fingerprint, bases, {})
    except (RuntimeError, ValueError):
        logger.warning("DeltaStore: no bases can be fitted to what the text's keys and queries are", exc_info=True)
        return None


def _at_the_first(group: Any, moments: list[Moments]) -> list[list[Moments]] | None:
    """Every rank's moments, on the first rank."""
    if group.world_size == 1:
        return [moments]
    gathered: list[Any] | None = [None] * group.world_size if group.rank_in_group == 0 else None
    torch.distributed.gather_object(moments, gathered, dst=group.ranks[0], group=group.cpu_group)
    return gathered


def _saved(calibration: Calibration, path: Path) -> bool:
    try:
        calibration.save(path)
    except (OSError, SafetensorError) as error:
        logger.warning("DeltaStore: the calibration could not be kept (%s); the next start makes it anew", error)
        return False
    return True


@torch.inference_mode()
def observe(kvc: Any, layers: Sequence[Any], text: str | None) -> list[Moments]:
    """This rank's moments by layer, on the host, over the text's sequences. Raises ValueError for a tokenizer that is
    not the model's."""
    text_config = kvc.model_config.hf_text_config
    tokens = min(TOKENS, kvc.model_config.context_len)
    count = SEQUENCES_ON_CPU if kvc.device == "cpu" else SEQUENCES
    found = sequences(_tokenizer(kvc.server_args), count, tokens, text)
    if (most := max(int(ids.max()) for ids in found)) >= kvc.model_config.vocab_size:
        raise ValueError(f"the tokenizer has a token {most}, the model a vocabulary of {kvc.model_config.vocab_size}")
    backend = _Observing(layers)
    silent = get_tp_group().rank_in_group != 0
    # The model's own context, not --context-length: later starts with another one read the same file.
    firsts = first_positions(len(found), tokens, getattr(text_config, "max_position_embeddings", None))
    bar = tqdm(zip(found, firsts, strict=True), "DeltaStore: calibrating", len(found), unit="sequence", disable=silent)
    for ids, first in bar:
        run_raw(kvc, ids.to(kvc.device), backend, first)
    return [backend.moments[layer.layer_id].to("cpu") for layer in layers]


def _tokenizer(server_args: Any) -> Any:
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    return get_tokenizer(
        server_args.tokenizer_path or server_args.model_path,
        tokenizer_mode=server_args.tokenizer_mode,
        trust_remote_code=server_args.trust_remote_code,
        revision=server_args.revision,
    )
