"""The `--kv-compress*` flags on SGLang's command line, YAML config, and `Engine(...)`."""

from __future__ import annotations

import argparse
from typing import Any

from ..policy.config import KERNELS, MODES, Settings
from ..policy.refusals import check_flags
from ..policy.tiers import DEFAULT_TIER, SERVED_TIERS

_ATTRIBUTE = "_deltastore_settings"
"""Rides on the ServerArgs record; pickling to child processes keeps it."""

_OFF = Settings()
#: argument -> field of Settings
_FIELDS = {
    "kv_compress": "mode",
    "kv_compress_tier": "tier_name",
    "kv_compress_calibration": "calibration",
    "kv_compress_calibration_text": "calibration_text",
    "kv_compress_kernels": "kernels",
    "kv_compress_show_prompts": "show_prompts",
    "kv_compress_canary": "canary",
}


def is_native(server_args: Any) -> bool:
    """Whether this record, or record type, has the flags as fields: in a fork with our patch (see patches/)."""
    return hasattr(server_args, "kv_compress")


def settings_of(server_args: Any) -> Settings:
    """What was asked for; mode "none" when nothing was."""
    if is_native(server_args):
        given = {field: getattr(server_args, name, None) for name, field in _FIELDS.items()}
        return Settings(**{field: value for field, value in given.items() if value is not None})
    return getattr(server_args, _ATTRIBUTE, _OFF)


def add_cli_args(_result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER ServerArgs.add_cli_args."""
    from sglang.srt.server_args import ServerArgs

    if is_native(ServerArgs):
        return
    group = parser.add_argument_group("DeltaStore: compressed KV cache")
    group.add_argument(
        "--kv-compress",
        choices=MODES,
        help=f"Store the KV cache rotated and quantized in the radix tree. Default: {_OFF.mode}.",
    )
    group.add_argument(
        "--kv-compress-tier",
        choices=tuple(SERVED_TIERS),
        help="; ".join(f"{tier.name}: {tier.summary}" for tier in SERVED_TIERS.values())
        + f". Default: {DEFAULT_TIER}.",
    )
    group.add_argument(
        "--kv-compress-calibration",
        metavar="FILE|none|auto",
        help="What was learned of this model's keys; it halves what compression costs. auto: the user's cache, where "
        "the first start with a model leaves it (a minute on two cores for a small model); FILE: what deltastore "
        f"calibrate made. Default: {_OFF.calibration}.",
    )
    group.add_argument(
        "--kv-compress-calibration-text",
        metavar="FILE",
        help="Plain text like what will be served, to learn from instead of the one that comes with DeltaStore.",
    )
    group.add_argument(
        "--kv-compress-kernels",
        choices=KERNELS,
        help="auto: the fastest for the device; cpu: compiled C++; triton and flashinfer (CUDA kernels built by "
        f"FlashInfer): for GPUs; reference: their twins in plain torch, slow. Default: {_OFF.kernels}.",
    )
    group.add_argument(
        "--kv-compress-show-prompts",
        action="store_true",
        default=None,
        help="Let GET /deltastore/stats and the dashboard show the first tokens of the tree's nodes: what users wrote. "
        "Without it no text leaves the server.",
    )
    group.add_argument(
        "--kv-compress-canary",
        metavar="SHARE",
        type=_share,
        help="Run this share of the requests once more with raw attention, while the server is idle, and show in its "
        f"statistics what compression cost them. Default: {_OFF.canary:g}.",
    )


def _share(text: str) -> float:
    try:
        return Settings(canary=float(text)).canary
    except ValueError as error:
        message = str(error) if "canary" in str(error) else f"{text}: allowed is a number from 0 to 1, as 0.01"
        raise argparse.ArgumentTypeError(message) from None


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that the command line sets; one that it does not name is None in `args`."""
    return {name: value for name in _FIELDS if (value := getattr(args, name, None)) is not None}


def from_cli_args(original: Any, cls: type, args: argparse.Namespace) -> Any:
    """AROUND ServerArgs.from_cli_args."""
    server_args = original(cls, args)
    if not is_native(cls):
        attach(server_args, _settings(flags_of(args)))
    return server_args


def engine_server_args(**kwargs: Any) -> Any:
    """ServerArgs for `Engine(kv_compress=..., kv_compress_tier=..., ...)`."""
    from sglang.srt.server_args import ServerArgs

    if is_native(ServerArgs):
        return ServerArgs(**kwargs)
    given = {name: kwargs.pop(name) for name in _FIELDS if name in kwargs}
    settings = _settings({name: value for name, value in given.items() if value is not None})
    server_args = ServerArgs(**kwargs)
    attach(server_args, settings)
    return server_args


def _settings(given: dict[str, Any]) -> Settings:
    """Settings from what was set; raises Refused where a flag is set without the one that switches DeltaStore on."""
    check_flags(given)
    return Settings(**{_FIELDS[name]: value for name, value in given.items()})


def check_fields(server_args: Any) -> None:
    """Raises Refused as `from_cli_args` does, for a record that has the flags as fields."""
    if is_native(server_args):
        check_flags({name: value for name in _FIELDS if (value := getattr(server_args, name, None))})


def attach(server_args: Any, settings: Settings) -> None:
    """Remember settings on the record; nothing is set when DeltaStore is off."""
    if settings.enabled:
        setattr(server_args, _ATTRIBUTE, settings)
