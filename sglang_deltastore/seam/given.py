"""What the user gave is looked at before anything heavy starts, and a refusal on a command line is one sentence.

SGLang imports torch and more before it loads a plugin; nothing here can come sooner than that.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ..policy import refusals
from ..policy.calibration import CalibrationError
from . import flags
from .flags import settings_of
from .targets import HTTP_APP_VARIABLE, WORKER_APP

EXIT_CODE = 78
"""EX_CONFIG of sysexits.h: what was asked for cannot be served."""

_ON_COMMAND_LINE = "_deltastore_on_command_line"
"""Rides on the ServerArgs record of a command line; whoever made one with Engine(...) gets exceptions."""

_RUST_SERVER = "SGLANG_RUST_SERVER"


def check_given(server_args: Any) -> None:
    """Raises Refused for what excludes DeltaStore by the options and the environment alone."""
    refusals.check_version()
    refusals.check_options(*fields_of(server_args))
    refusals.check_drafts(
        server_args.speculative_algorithm,
        server_args.speculative_draft_model_path,
        server_args.speculative_num_steps,
        server_args.speculative_num_draft_tokens,
        server_args.enable_hierarchical_cache,
    )
    refusals.check_canary(settings_of(server_args).canary, server_args.tp_size, server_args.speculative_algorithm)
    if os.environ.get(HTTP_APP_VARIABLE, WORKER_APP) != WORKER_APP:
        refusals.check_foreign_app(HTTP_APP_VARIABLE, server_args.tokenizer_worker_num)
    if os.environ.get(_RUST_SERVER, "0").lower() not in ("", "0", "false", "no"):
        raise refusals.Refused(
            f"--kv-compress deltastore with {_RUST_SERVER}={os.environ[_RUST_SERVER]}: allowed is unset, because "
            "requests would come past DeltaStore's checks; unset it"
        )


def from_cli_args(original: Any, cls: type, args: argparse.Namespace) -> Any:
    """AROUND ServerArgs.from_cli_args: with the flags, and refused if the options alone exclude DeltaStore."""
    try:
        server_args = flags.from_cli_args(original, cls, args)
        if settings_of(server_args).enabled:
            check_given(server_args)
    except refusals.Refused as refusal:
        end_with(refusal)
    setattr(server_args, _ON_COMMAND_LINE, True)
    return server_args


def refuse_before_imports() -> None:
    """When the plugin begins to load in a launcher: what its command line alone decides, before the rest is imported.

    Whatever cannot be parsed here is left to SGLang's own parser, and so is a command line that a file adds to.
    """
    launches = Path(sys.argv[0]).name == "launch_server.py" or sys.argv[1:2] == ["serve"]
    has_file = any(argument.split("=")[0] == "--config" for argument in sys.argv)
    asks = any(argument.startswith("--kv-compress") for argument in sys.argv)
    if not launches or not asks or has_file or multiprocessing.parent_process() is not None:
        return
    from sglang.srt.server_args import ServerArgs

    class Quiet(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise argparse.ArgumentError(None, message)

    parser = Quiet(add_help=False)
    ServerArgs.add_cli_args(parser)
    flags.add_cli_args(None, parser)
    try:
        args, _ = parser.parse_known_args(sys.argv[1:])
    except argparse.ArgumentError:
        return
    from_cli_args(ServerArgs.from_cli_args.__func__, ServerArgs, args)


@contextmanager
def in_a_sentence(server_args: Any) -> Iterator[None]:
    """On a command line, a refusal ends the process with its sentence instead of a traceback."""
    try:
        yield
    except (refusals.Refused, CalibrationError) as refusal:
        if not getattr(server_args, _ON_COMMAND_LINE, False):
            raise
        end_with(refusal)


def or_end(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of the scheduler's start, whose refusals end that process with their sentence."""

    @functools.wraps(hook)
    def ending(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except (refusals.Refused, CalibrationError) as refusal:
            end_with(refusal)

    return ending


def end_with(refusal: Exception) -> NoReturn:
    print(f"error: {refusal}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_CODE)


def fields_of(server_args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(as given, when nothing is given), by field; without our own flags, which a patched SGLang has as fields."""
    import msgspec

    given, defaults = {}, {}
    for field in msgspec.structs.fields(type(server_args)):
        if not field.name.startswith("kv_compress"):
            given[field.name] = getattr(server_args, field.name)
            made = field.default_factory is not msgspec.NODEFAULT
            defaults[field.name] = field.default_factory() if made else field.default
    return given, defaults
