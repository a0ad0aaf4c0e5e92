"""The same requests through `sglang.Engine`, without HTTP: a process for each side, batches in turn."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sglang_deltastore.host import activate

from .case import Case
from .runner import turned
from .sides import as_engine_options
from .workloads import Prompt, Request, words

_STOP_TIMEOUT_S = 30


@dataclass
class Batch:
    """What one batch took. `cached_tokens` of its prompts' tokens were not computed."""

    seconds: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int


def compare(case: Case, folder: Path) -> list[dict[str, Any]]:
    """A row for each side; the engines' logs go into `folder`."""
    answer_tokens = case.requests[0].answer_tokens
    found: dict[str, list[Batch]] = {side.name: [] for side in case.sides}
    with ExitStack() as stack:
        engines = {
            side.name: stack.enter_context(
                _engine({"model_path": case.model, **as_engine_options(side)}, folder / f"{side.name}.log")
            )
            for side in case.sides
        }
        for engine in engines.values():
            _answer(engine, [words(64, random.Random(0))], answer_tokens)  # pays for what is loaded on first use
        all_batches = list(batches(case.requests, case.running))
        for number, batch in enumerate(tqdm(all_batches, unit="batch", file=sys.stderr)):
            for name in turned(list(engines), number):
                found[name].append(_answer(engines[name], [request.prompt for request in batch], answer_tokens))
    return [{"benchmark": "serving-offline", **case.row(side), **_figures(found[side.name])} for side in case.sides]


def batches(requests: Sequence[Request], most: int) -> Iterator[list[Request]]:
    """Runs of the requests in their order, of at most `most`, each of another session."""
    batch: list[Request] = []
    for request in requests:
        if len(batch) == most or request.session in {other.session for other in batch}:
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _figures(found: Sequence[Batch]) -> dict[str, Any]:
    seconds, output, prompt, cached = (
        sum(getattr(batch, name) for batch in found)
        for name in ("seconds", "output_tokens", "prompt_tokens", "cached_tokens")
    )
    return {
        "output_tokens_per_s": output / seconds,
        "tokens_per_s": (prompt + output) / seconds,
        "prompt_tokens": prompt,
        "computed_tokens": prompt - cached,
        "cached_tokens": cached,
        "wall_s": seconds,
    }


@contextmanager
def _engine(options: dict[str, Any], log_path: Path) -> Iterator[Connection]:
    """A process with an engine at the other end."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(there, options, log_path))
    process.start()
    there.close()
    try:
        here.recv()  # ready; EOFError: it ended, its log says why
        yield here
    except EOFError:
        raise RuntimeError(f"the engine ended; its log: {log_path.read_text(errors='replace')[-3000:]}") from None
    finally:
        here.close()  # ends the loop there
        process.join(_STOP_TIMEOUT_S)
        if process.is_alive():
            process.kill()


def _answer(engine: Connection, prompts: list[Prompt], answer_tokens: int) -> Batch:
    engine.send((prompts, answer_tokens))
    batch: Batch = engine.recv()
    if batch.output_tokens != len(prompts) * answer_tokens:
        raise RuntimeError(f"{batch.output_tokens} output tokens; {len(prompts)} x {answer_tokens} were asked for")
    return batch


def _run(pipe: Connection, options: dict[str, Any], log_path: Path) -> None:
    """The child: an engine that answers batches until the pipe is closed."""
    with open(log_path, "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    activate()
    import sglang

    engine = sglang.Engine(**options)
    pipe.send("ready")
    try:
        while True:
            prompts, answer_tokens = pipe.recv()
            sampling = {"temperature": 0, "max_new_tokens": answer_tokens, "ignore_eos": True}
            begin = time.perf_counter()
            answers = engine.generate(input_ids=prompts, sampling_params=sampling)
            seconds = time.perf_counter() - begin
            metas = [answer["meta_info"] for answer in answers]
            sums = (
                sum(meta[name] for meta in metas) for name in ("completion_tokens", "prompt_tokens", "cached_tokens")
            )
            pipe.send(Batch(seconds, *sums))
    except EOFError:
        pass  # nobody asks any more
    finally:
        engine.shutdown()
