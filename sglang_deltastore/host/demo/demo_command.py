"""`deltastore demo`: serve, talk to it as two users would, show what the store did, check that it is right."""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from ...observe.stats import StoreStats
from ...policy.tiers import DEFAULT_TIER, TIERS
from .. import ModelError, model_path
from ..server_process import ServerFailed, serve
from .conversation import TURNS, History, StoredSequences, Turn

MAX_ANSWER_TOKENS = 32
SERVER_ARGUMENTS = (
    "--device", "cpu", "--kv-compress", "deltastore", "--max-total-tokens", "32768",
    "--max-running-requests", "8", "--dtype", "float32", "--enable-cache-report", "--sleep-on-idle",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One answered turn."""

    user: str
    turn: str
    prompt_tokens: int
    cached_tokens: int
    expected_cached_tokens: int
    ttft_s: float
    output_tokens_per_s: float
    answer: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="Hugging Face folder to serve (default: the embedded SmolLM2-135M-Instruct)")
    parser.add_argument("--tier", choices=tuple(TIERS), default=DEFAULT_TIER, help="default: %(default)s")
    parser.add_argument("--log", type=Path, help="keep the server's log here (default: a temporary file)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")


class Ended(BaseException):
    """A signal asks the program to end; the server goes on the way out. No Exception: nothing may take it for one."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal = signal.Signals(signal_number)


@contextmanager
def _signals_end_us() -> Iterator[None]:
    """While inside, the signals that end programs raise Ended, so that every `finally` runs. Ignored ones stay ignored
    (nohup)."""

    def end(signal_number: int, frame: object) -> None:
        raise Ended(signal_number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(args: argparse.Namespace) -> int:
    console = Console()
    try:
        with _signals_end_us():
            turns, stats = _serve_and_talk(args, console)
    except (ServerFailed, ModelError) as failure:
        console.print(f"[red]{failure}[/red]")
        return 1
    except Ended as ended:
        console.print(f"\n[red]ended by {ended.signal.name}; the server is gone[/red]")
        return 128 + ended.signal
    problems = [*_turn_problems(turns), *_store_problems(stats)]
    console.print(_turn_table(turns), _store_table(stats))
    if args.json:
        report = {"turns": [asdict(turn) for turn in turns], "store": stats.as_dict(), "problems": problems}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    for problem in problems:
        console.print(f"[red]not as it must be:[/red] {problem}")
    if not problems:
        console.print("[green]Every turn hit exactly the whole pages it shares with what was stored before.[/green]")
    return 1 if problems else 0


def _serve_and_talk(args: argparse.Namespace, console: Console) -> tuple[list[Measured], StoreStats]:
    """Start the server, ask every turn, end the server."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = args.model or model_path()
        with console.status("starting SGLang with --kv-compress deltastore (about a minute)"):
            server = stack.enter_context(
                serve(
                    model,
                    [*SERVER_ARGUMENTS, "--kv-compress-tier", args.tier],
                    log_path=args.log or folder / "server.log",
                )
            )
        client = OpenAI(base_url=server.url + "/v1", api_key="none")
        history, stored = History(), StoredSequences(server.store_stats().page_tokens)
        turns = []
        for turn in TURNS:
            console.print(f"\n[bold]{turn.user}[/bold] ({turn.label}): {turn.question}")
            turns.append(_ask(client, turn, history, stored))
            history.remember(turn, turns[-1].answer)
        return turns, server.settled_stats()


def _ask(client: OpenAI, turn: Turn, history: History, stored: StoredSequences) -> Measured:
    """Stream one answer to the terminal and measure it."""
    started = time.perf_counter()
    first_token_at, pieces, extras, usage = None, [], {}, None
    stream = client.chat.completions.create(
        model="default",
        messages=history.messages(turn),
        temperature=0,
        max_tokens=MAX_ANSWER_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_input_ids_in_sglext": True, "return_output_ids_in_sglext": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first_token_at = first_token_at or time.perf_counter()
            pieces.append(chunk.choices[0].delta.content)
            print(pieces[-1], end="", flush=True)
        extras = getattr(chunk, "sglext", None) or extras
        usage = chunk.usage or usage
    ended = time.perf_counter()
    print()
    assert usage is not None and usage.prompt_tokens_details is not None, "the server sent no usage"
    prompt_ids, output_ids = extras["input_ids"], extras["output_ids"][0]
    expected = stored.expected_hit_tokens(prompt_ids)
    stored.add(prompt_ids, output_ids)
    first_token_at = first_token_at or ended
    return Measured(
        user=turn.user,
        turn=turn.label,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.prompt_tokens_details.cached_tokens or 0,
        expected_cached_tokens=expected,
        ttft_s=first_token_at - started,
        output_tokens_per_s=(usage.completion_tokens - 1) / max(ended - first_token_at, 1e-9),
        answer="".join(pieces),
    )


def _turn_problems(turns: list[Measured]) -> list[str]:
    wrong_hits = [
        f"{turn.user}, {turn.turn}: {turn.cached_tokens} tokens came from the cache, not {turn.expected_cached_tokens}"
        for turn in turns
        if turn.cached_tokens != turn.expected_cached_tokens
    ]
    # Only the very first request finds nothing stored.
    misses = [f"{turn.user}, {turn.turn}: nothing to hit" for turn in turns[1:] if not turn.expected_cached_tokens]
    silent = [f"{turn.user}, {turn.turn}: no answer" for turn in turns if not turn.answer.strip()]
    return wrong_hits + misses + silent


def _store_problems(stats: StoreStats) -> list[str]:
    problems = list(stats.accounting_errors)
    if not stats.census_current:
        problems.append("the server did not come to rest: not every page was looked at")
    if not stats.shared_tokens:
        problems.append("no tokens are shared by several requests")
    if stats.tier != "raw" and stats.ratio <= 1:
        problems.append(f"ratio {stats.ratio}: nothing was compressed")
    return problems


def _turn_table(turns: list[Measured]) -> Table:
    table = Table(title="\nTurns")
    table.add_column("user")
    table.add_column("turn")
    for name in ("prompt tokens", "from cache", "must hit", "first token", "then"):
        table.add_column(name, justify="right")
    for turn in turns:
        table.add_row(
            turn.user, turn.turn, f"{turn.prompt_tokens:,}", f"{turn.cached_tokens:,}",
            f"{turn.expected_cached_tokens:,}", f"{turn.ttft_s:.2f} s", f"{turn.output_tokens_per_s:.1f} tokens/s",
        )  # fmt: skip
    return table


def _store_table(stats: StoreStats) -> Table:
    table = Table(title="\nStore", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, value in (
        ("tier", f"{stats.tier} ({stats.format})"),
        ("bytes per token", f"{stats.bytes_per_token:,.0f}"),
        ("  the same in fp16", f"{stats.fp16_bytes_per_token:,.0f}"),
        ("ratio", f"{stats.ratio:.2f}"),
        ("  with every frame of this server", f"{stats.resident_ratio:.2f}"),
        ("pages free", f"{stats.pages_free:,}"),
        ("pages in nodes", f"{stats.pages_in_nodes:,}"),
        ("pages running", f"{stats.pages_running:,}"),
        ("tokens that several requests share", f"{stats.shared_tokens:,}"),
    ):
        table.add_row(label, value)
    return table
