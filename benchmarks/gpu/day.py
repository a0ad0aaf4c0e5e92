"""gpu-day: all that this project wants to know of a GPU, from one command, in half an hour.

    python -m benchmarks.gpu.day --out FOLDER --minutes 10      again with --after FOLDER/rows.jsonl for the rest

It needs torch, triton, numpy and a CUDA GPU; what else it could use (the CUDA kernels' modules, FlashInfer, SGLang) it
names at once where it is not there. Stages are made of pieces; each runs in a process of its stage, which may crash or
be stopped, and writes its row to rows.jsonl at once. A piece that has a row is not run again. Stages take turns: the
first pieces of all come first, and what a stage has no time for waits for its next turn.

No figure is written whose answer was not checked before. `--rehearse` runs everything, tiny, on a machine without a
GPU: in Triton's interpreter, on fibers, and without a time in any row.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from benchmarks.provenance import ROOT, provenance

PACKED = ROOT / ".gpu-day"
"""What `make gpu-day-pack` prepares (benchmarks/gpu/pack.py); it travels with the working tree."""
NEEDED = ("torch", "triton", "numpy")
COULD_USE = {
    "tvm_ffi": "no CUDA kernels (make gpu-day-pack brings apache-tvm-ffi and built modules)",
    "flashinfer": "no CUDA extend, no comparison with FlashInfer; CUDA kernels only as built by make gpu-day-pack",
    "sglang": "no servers",
}
OK, FAILED, ABSENT = "ok", "failed", "absent"
START = "start"
"""In place of a piece: what a stage's process does before its first."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """`pieces`: the module and function that list them, imported in the stage's own process; seconds of one turn."""

    module: str
    seconds: int
    function: str = "pieces"


STAGES = {
    "device": Stage("benchmarks.gpu.ceilings", 60),
    "correct": Stage("benchmarks.gpu.correctness", 90),
    "decode": Stage("benchmarks.gpu.decode", 90),
    "writes": Stage("benchmarks.gpu.writes", 45),
    "graph": Stage("benchmarks.gpu.model", 45, "graph_pieces"),
    "model": Stage("benchmarks.gpu.model", 90),
    "served": Stage("benchmarks.gpu.served", 300),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.day", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="rows.jsonl is written there")
    parser.add_argument("--minutes", type=float, default=25, help="end by then (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--after", type=Path, metavar="FILE", help="rows of an earlier call: what has one is done")
    parser.add_argument("--again", action="store_true", help="run pieces anew that failed or lacked something")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: everything, tiny, no times")
    parser.add_argument("--only", choices=STAGES, help=argparse.SUPPRESS)  # a stage's own process
    options = parser.parse_args(arguments)
    sys.path.append(str(PACKED / "site"))  # last: what is installed was made for this Python
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        print(f"gpu-day: {', '.join(missing)} not installed; it needs {', '.join(NEEDED)}", file=sys.stderr)
        return 1
    rows = Rows(options.out / "rows.jsonl")
    if options.only:
        return run_pieces(options.only, rows, options.rehearse)
    return take_turns(options, rows)


class Rows:
    """The rows' file: one JSON object a line, on disk at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[Row]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def add(self, *rows: Row) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def done(self, stage: str) -> set[str]:
        return {row["piece"] for row in self.read() if row["stage"] == stage}

    def begin(self, piece: str | None, left: int) -> None:
        """Says which piece is being run, and how many are left with it: what a process that dies leaves behind."""
        self._begun.write_text(json.dumps([piece, left]))

    def begun(self) -> tuple[str | None, int]:
        piece, left = json.loads(self._begun.read_text())
        return piece, left

    @property
    def _begun(self) -> Path:
        return self.path.with_name("begun.json")


# ---- a stage's own process ----


def run_pieces(stage: str, rows: Rows, rehearse: bool) -> int:
    """0: all that are left were run; 1: the process is of no more use."""
    from importlib import import_module

    import torch

    from benchmarks.gpu.machine import Absent, here
    from deltastore_kernels.cuda_build import CudaUnavailable

    machine = here(rehearse)
    machine = replace(machine, bytes_per_us=measured_bytes_per_us(rows.read()))
    module = import_module(STAGES[stage].module)
    done, facts = rows.done(stage), provenance(machine.device) | {"rehearsed": machine.rehearsed}
    if not facts["commit"] and (PACKED / "commit").exists():
        facts["commit"] = (PACKED / "commit").read_text()  # a copy of the working tree without its history
    left = [piece for piece in getattr(module, STAGES[stage].function)(machine) if piece.name not in done]
    for number, piece in enumerate(left):
        rows.begin(piece.name, len(left) - number)
        begin, found = time.perf_counter(), {}
        try:
            found = {"status": OK, "checked": True} | piece.run(machine)
        except Exception as error:
            absent = isinstance(error, Absent | CudaUnavailable | torch.OutOfMemoryError)
            found = {"status": ABSENT if absent else FAILED, "error": f"{type(error).__name__}: {error}"[-2000:]}
        seconds = round(time.perf_counter() - begin, 1)
        rows.add({"stage": stage, "piece": piece.name} | found | {"seconds": seconds} | facts)
        print(f"{stage}: {piece.name}: {said(found)}", flush=True)
        gc.collect()
        if not machine.rehearsed:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                return 1  # an illegal access, say: every further call in this process would fail
    rows.begin(None, 0)
    return 0


def measured_bytes_per_us(rows: list[Row]) -> float | None:
    """The better of reading and copying, as measured on this machine."""
    rates = [row["bytes_per_us"] for row in rows if row["stage"] == "device" and row.get("bytes_per_us")]
    return max(rates, default=None)


def said(found: Row) -> str:
    if found["status"] != OK:
        return f"{found['status']}: {found['error'].splitlines()[-1][:300]}"
    numbers = [f"{found[name]:.3g} {name}" for name in FIGURES if isinstance(found.get(name), int | float)]
    return ", ".join(numbers) or OK


FIGURES = ("us", "x_of_bound", "ms_a_step", "tokens_per_s", "bytes_per_us", "tera_operations_per_s", "error")


# ---- the command ----


def take_turns(options: argparse.Namespace, rows: Rows) -> int:
    if options.after:
        kept = [json.loads(line) for line in options.after.read_text().splitlines()]
        present = {(row["stage"], row["piece"]) for row in rows.read()}
        rows.add(*(row for row in kept if (row["stage"], row["piece"]) not in present))
    if options.again:
        good = [row for row in rows.read() if row["status"] == OK]
        rows.path.unlink(missing_ok=True)
        rows.add(*good)
    if not options.rehearse and not has_gpu():
        print("gpu-day: no NVIDIA GPU (torch.cuda.is_available() is False). --rehearse runs everything, tiny, without "
              "one; what can be said without one: python -m benchmarks.gpu.static_report", file=sys.stderr)  # fmt: skip
        return 1
    environ = environment(options.rehearse)
    command = [sys.executable, "-m", "benchmarks.gpu.day", "--out", str(options.out.resolve())]
    command += ["--rehearse"] * options.rehearse
    for package, what in COULD_USE.items():
        if find_spec(package) is None:
            print(f"gpu-day: no {package} here: {what}", flush=True)
    end = time.monotonic() + 60 * options.minutes
    left: Counter[str] = Counter({stage: 1 for stage in options.stages})
    number = 0
    while +left and time.monotonic() < end:
        number += 1  # later turns are longer: each costs the start of a process
        for stage in options.stages:
            seconds = min(number * STAGES[stage].seconds, end - time.monotonic())
            if left[stage] and seconds > 0:
                left[stage] = turn(stage, rows, seconds, [*command, "--only", stage], environ)
    print(summary(rows.read(), +left))
    return int(any(row["status"] == FAILED for row in rows.read()))


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def environment(rehearse: bool) -> dict[str, str]:
    """Of the stages' processes: modules that were packed are found, and Triton's interpreter is chosen before Python
    starts."""
    paths = [ROOT / "kernels", ROOT]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])}
    if rehearse:
        return environ | {"TRITON_INTERPRET": "1"}
    if (PACKED / "modules").exists():
        environ.setdefault("DELTASTORE_CUDA_MODULES", str(PACKED / "modules"))
    return environ


def turn(stage: str, rows: Rows, seconds: float, command: list[str], environ: dict[str, str]) -> int:
    """One turn of a stage: how many of its pieces are left. A process that dies is followed by another."""
    end, log, left = time.monotonic() + seconds, rows.path.with_name("day.log"), 1
    while left and (limit := end - time.monotonic()) > 0:
        rows.begin(START, 1)
        before = len(rows.read())
        with log.open("a") as file:
            code = run_for(limit, command, environ, file)
        piece, left = rows.begun()
        had_it_all = piece != START and len(rows.read()) == before and limit >= STAGES[stage].seconds / 2
        if piece in rows.done(stage) - {START}:
            left -= 1
        elif piece and (code is not None or had_it_all):
            why = f"took longer than {limit:.0f} s" if code is None else f"the process ended with {code}: {tail(log)}"
            row = {"stage": stage, "piece": piece, "status": FAILED, "error": why, "rehearsed": "--rehearse" in command}
            rows.add(row)
            left -= 1
            print(f"{stage}: {piece}: {said(row)}", flush=True)
        if code is None:
            break
    return left


def run_for(seconds: float, command: list[str], environ: dict[str, str], log: IO[str]) -> int | None:
    """What a process of its own group ends with; None: it was stopped, with what it started."""
    process = subprocess.Popen(command, env=environ, stderr=log, cwd=ROOT, process_group=0)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for sent in (signal.SIGINT, signal.SIGKILL):  # first so that it may end its own servers
            if process.poll() is None:
                os.killpg(process.pid, sent)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)


def tail(log: Path) -> str:
    return log.read_text()[-1500:]


def summary(rows: list[Row], left: Counter[str]) -> str:
    """What was found, the most telling last: a reader may see the end alone."""
    lines = ["", "gpu-day: REHEARSED on a machine without a GPU: no times" if any(r["rehearsed"] for r in rows) else ""]
    for stage in STAGES:
        own = [row for row in rows if row["stage"] == stage]
        counts = Counter(row["status"] for row in own)
        if own or left[stage]:
            found = ", ".join(f"{count} {status}" for status, count in counts.items())
            lines.append(f"{stage:8} {found}{f'; {left[stage]} at least are left' if left[stage] else ''}")
    lines += [
        f"  FAILED {row['stage']}: {row['piece']}: {row['error'].splitlines()[-1][:300]}"
        for row in rows
        if row["status"] == FAILED
    ]
    for key in ("us", "ms_a_step"):
        timed = [row for row in rows if row["status"] == OK and row.get(key) and row.get("kernel")]
        base = {where(row): row[key] for row in timed if row["kernel"] == "sdpa bf16"}
        for row in timed:
            times = f", {base[where(row)] / row[key]:.2f} x bf16 SDPA" if where(row) in base else ""
            bound = f", {row['x_of_bound']:.2f} x its bytes' time" if row.get("x_of_bound") else ""
            lines.append(f"  {row['piece']}: {row[key]:.1f} {key}{bound}{times}")
    return "\n".join(lines)


def where(row: Row) -> tuple[str, str]:
    """A row's stage and what it was measured on: the piece's name without the contestant's."""
    return row["stage"], row["piece"].replace(row["kernel"], "").strip()


if __name__ == "__main__":
    sys.exit(main())
