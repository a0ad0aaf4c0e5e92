"""Requests and control messages are looked at before they reach the scheduler, which one bad one would end.

A ValueError raised here is answered with status 400. Nothing is looked at unless DeltaStore is on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException

from ..policy.request_rules import (
    REFUSED_CONTROLS,
    REFUSED_WITH_STORAGE,
    BadRequest,
    check_answers,
    check_media,
    check_positions,
    check_prompt,
    check_sampling,
)
from .flags import settings_of

#: fields of a tokenized request that are checked above, or that only the sender makes
_NOT_FROM_OUTSIDE = ("input_ids", "input_embeds", "mm_inputs", "time_stats")


def check_sent(manager: Any, request: Any, *_: Any, **__: Any) -> None:
    """BEFORE TokenizerManager.generate_request: what SGLang multiplies the prompt by, and what comes beside it."""
    if not settings_of(manager.server_args).enabled:
        return
    if request.sampling_params is not None:
        check_answers(request.sampling_params)
    if manager.model_config.is_multimodal:
        check_media(request, manager.model_config.hf_config.architectures)


def check_request(_result: None, manager: Any, request: Any, input_ids: list[int] | None) -> None:
    """AFTER TokenizerManager._validate_one_request: tokens and positions."""
    if not settings_of(manager.server_args).enabled or input_ids is None:
        return
    vocabulary_tokens = manager.model_config.vocab_size
    continues_session = bool(getattr(request, "session_params", None))
    if input_ids or not continues_session:
        check_prompt(input_ids, vocabulary_tokens)
    if hasattr(request, "logprob_start_len"):
        check_positions(request, None if continues_session else len(input_ids), vocabulary_tokens)


def check_tokenized(tokenized: Any, manager: Any, *_: Any, **__: Any) -> None:
    """AFTER TokenizerManager._create_tokenized_object: sampling parameters, and that the scheduler can read it all.

    The scheduler decodes what it is sent by declared types; a value of another type raises there.
    """
    if not settings_of(manager.server_args).enabled:
        return
    _check_types(tokenized)
    check_sampling(tokenized.sampling_params, manager.model_config.vocab_size, manager.context_len)


class ControlRefused(BadRequest, HTTPException):
    """Status 400 also from the routes that catch nothing."""

    def __init__(self, message: str) -> None:
        HTTPException.__init__(self, status_code=400, detail=message)

    def __str__(self) -> str:
        return self.detail


def refuse_control(command: str) -> Callable[..., None]:
    """BEFORE the method of TokenizerManager for one of REFUSED_CONTROLS or REFUSED_WITH_STORAGE."""

    def refuse(manager: Any, *_: Any, **__: Any) -> None:
        args = manager.server_args
        if not settings_of(args).enabled:
            return
        refused = REFUSED_CONTROLS | (REFUSED_WITH_STORAGE if args.hicache_storage_backend else {})
        if command in refused:
            raise ControlRefused(f"{command} is refused: {refused[command]}")

    return refuse


def _check_types(tokenized: Any) -> None:
    import msgspec
    from sglang.srt.managers.io_struct import msgpack_decode, msgpack_encode

    sent = copy.copy(tokenized)
    for name in _NOT_FROM_OUTSIDE:
        if hasattr(sent, name):
            setattr(sent, name, None)
    try:
        msgpack_decode(msgpack_encode(sent))
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        raise BadRequest(
            f"a value of the request has a wrong type or size ({error}); allowed are the types of SGLang's "
            "documentation; correct it"
        ) from error
