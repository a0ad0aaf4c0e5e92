"""Requests that SGLang lets through and that would end the server."""

from __future__ import annotations

from typing import Any

from .flags import settings_of


def refuse_unknown_tokens(_result: None, manager: Any, _request: Any, input_ids: list[int] | None) -> None:
    """AFTER TokenizerManager._validate_one_request: token ids must be in the vocabulary.

    SGLang 0.5.23 does not look, and on the CPU the embedding then raises in the scheduler. A
    ValueError here is answered with status 400.
    """
    if not settings_of(manager.server_args).enabled or not input_ids:
        return
    vocabulary = manager.model_config.vocab_size
    for token_id in (min(input_ids), max(input_ids)):
        if not 0 <= token_id < vocabulary:
            raise ValueError(
                f"input_ids contains {token_id}; allowed is 0 to {vocabulary - 1}; send ids of this model's tokenizer"
            )
