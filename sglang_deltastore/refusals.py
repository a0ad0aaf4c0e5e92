"""What we cannot serve is refused at start: what was given, what is allowed, what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from deltastore_kernels.layout import HEAD_DIMS, TILE_TOKENS

from .config import BACKEND_NAME

TESTED_VERSIONS = ("0.5.23",)
"""Versions of SGLang that the whole test suite has passed with."""

SERVED_DEVICES = ("cpu", "cuda")


class Refused(ValueError):
    """The server was asked for something that DeltaStore cannot serve."""


@dataclass(frozen=True)
class _Rule:
    """`option` as the user writes it, what it may be in words, and the test on its value."""

    option: str
    allowed: str
    accepts: Callable[[Any], bool]
    advice: str


def _unset(value: Any) -> bool:
    return not value


_OURS_OR_UNSET = (f"unset or {BACKEND_NAME}", lambda value: value in (None, BACKEND_NAME))
_TOGETHER = "drop one of the two"

#: Checked against the options as the user gave them.
OPTION_RULES = (
    _Rule("--attention-backend", *_OURS_OR_UNSET, "DeltaStore brings its own attention"),
    _Rule("--prefill-attention-backend", *_OURS_OR_UNSET, "DeltaStore brings its own attention"),
    _Rule("--decode-attention-backend", *_OURS_OR_UNSET, "DeltaStore brings its own attention"),
    _Rule("--radix-cache-backend", *_OURS_OR_UNSET, "DeltaStore brings its own tree"),
    _Rule(
        "--page-size", f"a multiple of {TILE_TOKENS}",
        lambda value: value is None or (value > 0 and value % TILE_TOKENS == 0),
        "a page holds whole tiles; leave it unset for the finest sharing",
    ),
    _Rule(
        "--kv-cache-dtype", "auto, bf16 or bfloat16", lambda value: value in ("auto", "bf16", "bfloat16"),
        "the tier decides how KV is stored; choose --kv-compress-tier",
    ),
    _Rule("--speculative-algorithm", "unset", _unset, _TOGETHER),
    _Rule("--disaggregation-mode", "null", lambda value: value in (None, "null"), _TOGETHER),
    _Rule("--enable-hierarchical-cache", "unset", _unset, _TOGETHER),
    _Rule("--enable-lmcache", "unset", _unset, _TOGETHER),
    _Rule("--enable-flexkv", "unset", _unset, _TOGETHER),
    _Rule("--enable-unified-cache-external-linker", "unset", _unset, _TOGETHER),
    _Rule("--enable-unified-memory", "unset", _unset, _TOGETHER),
    _Rule("--enable-page-major-kv-layout", "unset", _unset, _TOGETHER),
    _Rule("--enable-hisparse", "unset", _unset, _TOGETHER),
    _Rule("--enable-kv-cache-sharding", "unset", _unset, _TOGETHER),
    _Rule("--enable-streaming-session", "unset", _unset, "a session may stop inside a tile; " + _TOGETHER),
    _Rule("--enable-two-batch-overlap", "unset", _unset, _TOGETHER),
    _Rule("--enable-pdmux", "unset", _unset, _TOGETHER),
    _Rule("--dllm-algorithm", "unset", _unset, _TOGETHER),
    _Rule("--enable-deterministic-inference", "unset", _unset, _TOGETHER),
    _Rule("--prefill-only-disable-kv-cache", "unset", _unset, _TOGETHER),
    _Rule("--pipeline-parallel-size", "1", lambda value: value == 1, _TOGETHER),
    _Rule("--data-parallel-size", "1", lambda value: value == 1, "not yet proven with more ranks"),
)  # fmt: skip

#: SGLang's field names where they differ from the option's name.
_FIELDS = {
    "--pipeline-parallel-size": "pp_size",
    "--data-parallel-size": "dp_size",
}


def record_field(rule: _Rule) -> str:
    """The field of SGLang's ServerArgs that holds the rule's option."""
    return _FIELDS.get(rule.option, rule.option.removeprefix("--").replace("-", "_"))


def check_version() -> None:
    """Raises Refused unless the installed SGLang is one we have been tested with."""
    found = version("sglang")
    if found not in TESTED_VERSIONS:
        raise Refused(
            f"--kv-compress deltastore: SGLang {found} is installed; tested are "
            f"{', '.join(TESTED_VERSIONS)}; run: pip install sglang=={TESTED_VERSIONS[-1]}"
        )


def check_options(server_args: Any) -> None:
    """Raises Refused for an option, as the user gave it, that excludes DeltaStore."""
    for rule in OPTION_RULES:
        value = getattr(server_args, record_field(rule))
        if not rule.accepts(value):
            raise Refused(
                f"--kv-compress deltastore with {rule.option} {value}: allowed is {rule.allowed}; {rule.advice}"
            )


def check_foreign_app(variable: str, http_workers: int) -> None:
    """`variable` names an HTTP app that is not ours. Raises Refused where other processes than the launcher would
    import it: they load no plugins."""
    if http_workers > 1:
        raise Refused(
            f"--kv-compress deltastore with {variable} and --tokenizer-worker-num {http_workers}: allowed is one "
            f"worker, as others would not load DeltaStore; unset {variable}, or --tokenizer-worker-num"
        )


def check_device(device: str) -> None:
    """Raises Refused for a device whose kernels do not exist yet."""
    if device not in SERVED_DEVICES:
        raise Refused(
            f"--kv-compress deltastore with --device {device}: allowed is {', '.join(SERVED_DEVICES)}; "
            "kernels for other devices are not there yet; add --device cpu, or --kv-compress none"
        )


def check_model(model_config: Any) -> None:
    """Raises Refused for a model whose attention we cannot serve, from its configuration alone."""
    name = ", ".join(model_config.hf_config.architectures or ["a model without architectures"])

    def refuse(what: str, got: Any, allowed: str) -> None:
        raise Refused(
            f"--kv-compress deltastore with {name}: {what} is {got}; allowed is {allowed}; "
            "serve this model with --kv-compress none"
        )

    if model_config.attention_arch.name != "MHA":
        refuse("the attention architecture", model_config.attention_arch.name, "MHA, MQA or GQA")
    if model_config.is_encoder_decoder:
        refuse("is_encoder_decoder", True, "a decoder-only model")
    if not model_config.is_generation:
        refuse("is_generation", False, "a model that generates text")
    if model_config.head_dim not in HEAD_DIMS:
        refuse("head_dim", model_config.head_dim, f"one of {HEAD_DIMS} (the rotation needs a power of two)")
    if model_config.v_head_dim != model_config.head_dim:
        refuse("v_head_dim", model_config.v_head_dim, f"head_dim, {model_config.head_dim}")
