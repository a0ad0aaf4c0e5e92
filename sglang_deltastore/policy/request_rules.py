"""Requests that SGLang 0.5.23 lets into its scheduler and that would end it there.

Each check raises BadRequest, which a server answers with status 400: what was sent, what is allowed, what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

MOST_ANSWERS = 4096
"""Answers to one prompt (`n`). SGLang copies the prompt that often before it looks at anything else."""

LARGEST_BIAS = 1e30
"""Logits are float32: a larger bias, over a small temperature, is infinite, and no distribution comes of it."""

SMALLEST_FACTOR = 1e-6
"""Logits are divided by the repetition penalty, which is float32 as well."""

MOST_TOP_K = 1 << 30
"""SGLang's own "whole vocabulary"; top_k is an int32 in the scheduler."""

_MEMORY = (
    "DeltaStore's pages are not in SGLang's memory saver; allowed is /flush_cache, which empties them; to free the "
    "memory, end the server"
)
_EXPERTS = (
    "SGLang records experts only with --expert-distribution-recorder-mode, which DeltaStore does not serve; allowed is "
    "a server with --kv-compress none; record there"
)
_STORAGE = (
    "a running server's storage stays what it is; allowed is --hicache-storage-backend file at the start; start anew"
)
_STORED_WEIGHTS = (
    "stored pages are those of the weights that the server was started with; allowed is a server without "
    "--hicache-storage-backend; start anew with the new weights"
)
REFUSED_CONTROLS = {
    "attach_hicache_storage": _STORAGE,
    "detach_hicache_storage": _STORAGE,
    "release_memory_occupation": _MEMORY,
    "resume_memory_occupation": _MEMORY,
    "start_expert_distribution_record": _EXPERTS,
    "stop_expert_distribution_record": _EXPERTS,
    "dump_expert_distribution_record": _EXPERTS,
}
"""An administrator's commands, by the name of the method, that the scheduler cannot follow, or not without harm."""

REFUSED_WITH_STORAGE = {
    "update_weights_from_disk": _STORED_WEIGHTS,
    "update_weights_from_tensor": _STORED_WEIGHTS,
    "update_weights_from_distributed": _STORED_WEIGHTS,
    "update_weights_from_ipc": _STORED_WEIGHTS,
}
"""The same where a storage holds pages."""

MEDIA = ("image_data", "video_data", "audio_data")
"""Fields of a request with what is no text."""

WITH_IMAGES = ("Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration")
"""Architectures whose images have been compared with stock. Others may attend to an image in both directions (Gemma 3
and 4), which only SGLang's Triton backend does for them: behind ours they would be served, and be wrong."""


class BadRequest(ValueError):
    """The request cannot be served; the server goes on."""


def check_within(name: str, value: Any, low: float, high: float, advice: str) -> None:
    """Raises BadRequest unless value is a number from low to high (NaN is not)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadRequest(f"{name} is {value!r}; allowed is {low} to {high}; {advice}")


def check_tokens(name: str, token_ids: Iterable[Any], vocabulary_tokens: int) -> None:
    """Raises BadRequest for an id that is no token of the model."""
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocabulary_tokens:
            raise BadRequest(
                f"{name} contains {token_id!r}; allowed is 0 to {vocabulary_tokens - 1}; "
                "send ids of this model's tokenizer"
            )


def check_prompt(input_ids: list[int], vocabulary_tokens: int) -> None:
    """Raises BadRequest for a prompt without tokens, or with ids outside the vocabulary.

    SGLang runs an empty prompt, and samples its answer from the logits of another request in the same batch.
    """
    if not input_ids:
        raise BadRequest("the prompt has 0 tokens; allowed is 1 or more; send a text, or at least one token id")
    check_tokens("input_ids", (min(input_ids), max(input_ids)), vocabulary_tokens)


def check_answers(sampling_params: Any) -> None:
    """Raises BadRequest for a count of answers that would fill the memory before anything else is looked at."""
    for params in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
        if not isinstance(params, Mapping):
            raise BadRequest(f"sampling_params is {params!r}; allowed is an object for each prompt; see SGLang's docs")
        if params.get("n") is not None:
            check_within("n", params["n"], 1, MOST_ANSWERS, "send several requests instead")


def check_media(request: Any, architectures: Iterable[str]) -> None:
    """Raises BadRequest where `request` (one of SGLang's GenerateReqInput) brings an image, a video or a sound that has
    not been proven with a multimodal model of these architectures."""
    served = MEDIA[:1] if set(architectures) & set(WITH_IMAGES) else ()
    for name in MEDIA:
        if name not in served and _any_in(getattr(request, name, None)):
            raise BadRequest(
                f"{name} is given to {', '.join(architectures)}; allowed is "
                f"{f'text and {served[0]}' if served else 'text alone'}, because attention over it has not been proven "
                "with DeltaStore; send text, or serve this model with --kv-compress none"
            )


def _any_in(media: Any) -> bool:
    """Whether lists of lists of media hold one."""
    return any(map(_any_in, media)) if isinstance(media, list | tuple) else media is not None


def check_positions(request: Any, prompt_tokens: int | None, vocabulary_tokens: int) -> None:
    """Raises BadRequest where `request` (one of SGLang's GenerateReqInput) asks for log-probabilities or poolings that
    its prompt or the vocabulary does not have. prompt_tokens None: a session knows the rest of the prompt."""
    last = MOST_TOP_K if prompt_tokens is None else prompt_tokens
    check_within("logprob_start_len", request.logprob_start_len, -1, last, "-1 is: only of the answer")
    check_within("top_logprobs_num", request.top_logprobs_num, 0, vocabulary_tokens, "ask for fewer")
    for name in ("token_indices_to_pool", "multi_item_delimiter_indices"):
        for position in getattr(request, name) or ():
            check_within(name, position, 0, last - 1, "send positions inside the prompt")


def check_sampling(params: Any, vocabulary_tokens: int, context_tokens: int) -> None:
    """Raises BadRequest for sampling parameters (SGLang's SamplingParams, normalized) that its own checks let through
    and that raise in the scheduler, or make logits from which nothing can be sampled."""
    check_tokens("stop_token_ids", sorted(params.stop_token_ids or ()), vocabulary_tokens)
    check_within("min_new_tokens", params.min_new_tokens, 0, context_tokens, "ask for fewer")
    check_within("top_k", params.top_k, 1, MOST_TOP_K, "-1 is: the whole vocabulary")
    check_within("repetition_penalty", params.repetition_penalty, SMALLEST_FACTOR, 2, "1 is: no penalty")
    if params.stream_interval is not None:
        check_within("stream_interval", params.stream_interval, 1, context_tokens, "1 is: every token")
    for token_id, bias in (params.logit_bias or {}).items():
        check_within(f"logit_bias[{token_id}]", bias, -LARGEST_BIAS, LARGEST_BIAS, "-100 bans a token in practice")
    for pattern in params.stop_regex_strs or ():
        _check_pattern(pattern)


def _check_pattern(pattern: str) -> None:
    """SGLang parses a pattern here and compiles it in the scheduler, where more is refused."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadRequest(
            f"stop_regex is {pattern!r}, which does not compile ({error}); allowed is Python's re syntax; correct it"
        ) from error
