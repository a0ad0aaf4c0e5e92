"""Real servers for the end-to-end tests. A server takes half a minute to start: one a module."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sglang_deltastore.host.server_process import Server, serve

BASE_ARGUMENTS = ("--device", "cpu", "--dtype", "float32", "--sleep-on-idle", "--random-seed", "1")
#: whatever lies in the user's cache
UNCALIBRATED = ("--kv-compress-calibration", "none")
DELTASTORE = ("--kv-compress", "deltastore")
NGRAM = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "6")


def draft_model(folder: Path, algorithm: str = "STANDALONE") -> tuple[str, ...]:
    """Arguments of a server for which the model in this folder drafts."""
    return ("--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(folder))


StartServer = Callable[..., Server]


def of_ranks(count: int) -> dict[str, str]:
    """Environment of a server of several ranks on a CPU: SGLang wants to be told each one's cores, and to leave NCCL
    alone; it takes what other processes allocate meanwhile for ranks with unequal memory."""
    cores = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(count))
    unequal = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
    return {"SGLANG_CPU_OMP_THREADS_BIND": cores, "SGLANG_NCCL_SO_PATH": "none", **unequal}


def or_long(values: Sequence[Any], in_short: Container[Any]) -> list[Any]:
    """All values as parameters, those that are not in_short in the long run alone."""
    return [pytest.param(value, marks=() if value in in_short else pytest.mark.long) for value in values]


@pytest.fixture(scope="module")
def start_server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """start_server(*arguments, **options of serve) -> a server that ends with the module."""
    with ExitStack() as stack:

        def start(*arguments: str, **options: object) -> Server:
            log_path = tmp_path_factory.mktemp("server") / "log"
            # Without the plugin there is no such option. What comes later wins.
            uncalibrated = () if "torch_native" in arguments else UNCALIBRATED
            whole = (*BASE_ARGUMENTS, *uncalibrated, *arguments)
            return stack.enter_context(serve(smollm2, whole, log_path=log_path, **options))

        yield start
