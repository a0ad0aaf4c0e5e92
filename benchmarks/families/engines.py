"""SGLang engines in forked processes: one import of SGLang and its models serves all of them.

A process that has imported SGLang forks; the child starts an offline engine, whose own processes are forked too, and
runs one job with it. Whatever happens to it, the parent has its log.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

JOB_TIMEOUT_S = 300
_STARTED = "the engine has started"
_FORK = multiprocessing.get_context("fork")
#: an exception's line in a log, as Python prints it
_RAISED = re.compile(r"^(?:[a-z_0-9]+\.)*(?P<said>[A-Z]\w*(?:Error|Exception|NotInForce)(?P<why>: .+)?)$")
_REFUSED = re.compile(r"(?P<said>--kv-compress deltastore.*)$")


class Ended(RuntimeError):
    """The process ended before its job was done; the message is the last error of its log."""

    @property
    def had_started(self) -> bool:
        """Whether an engine was there and ended later."""
        return bool(self.args[1])

    def __str__(self) -> str:
        return str(self.args[0])


def import_sglang() -> None:
    """In the process that will fork: everything that an engine imports, and no thread."""
    from sglang_deltastore.host import activate

    activate()
    import sglang
    import sglang.srt.entrypoints.engine
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry  # noqa: F401


def in_a_child(job: Callable[[], Any], log_path: Path) -> Any:
    """job() of a forked process, which ends with all that it started. Raises Ended where it does not answer."""
    here, there = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_run, args=(job, there, log_path))
    process.start()
    there.close()
    try:
        if not here.poll(JOB_TIMEOUT_S):
            raise Ended(f"no answer in {JOB_TIMEOUT_S} s: {_last_error(log_path)}", _had_started(log_path))
        return here.recv()
    except EOFError:
        raise Ended(_last_error(log_path), _had_started(log_path)) from None
    finally:
        _kill_group(process.pid)
        process.join()


def _run(job: Callable[[], Any], pipe: Connection, log_path: Path) -> None:
    from sglang.srt.utils import kill_itself_when_parent_died

    kill_itself_when_parent_died()
    os.setsid()
    with open(log_path, "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        pipe.send(job())
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(0)  # multiprocessing would wait for SGLang's processes; the parent ends them


def _kill_group(group: int | None) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group or 0, signal.SIGKILL)


def _last_error(log_path: Path) -> str:
    """What a log says last of why its process ended; of an exception without words the line that raised it."""
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines()]
    if refused := [match["said"] for line in lines if (match := _REFUSED.search(line))]:
        return refused[-1]
    for above, line in reversed(list(pairwise(lines))):
        if match := _RAISED.match(line):
            return match["said"] if match["why"] else f"{match['said']}: {above}"
    return " ".join(lines[-3:])


def _had_started(log_path: Path) -> bool:
    return _STARTED in log_path.read_text(errors="replace")


def start(folder: Path, **options: Any) -> Any:
    """An offline engine of SGLang's, in a process that was forked for it."""
    # SGLang asks for fresh processes, which would each import it again.
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_args, **_kwargs: None  # type: ignore[assignment]
    import sglang

    engine = sglang.Engine(model_path=str(folder), **options)
    print(_STARTED, flush=True)
    return engine
