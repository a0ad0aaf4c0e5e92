"""gpu-day without a GPU: a rehearsal to its end, wrong answers, and stages that die, hang or lack something."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import flashinfer
import pytest
import torch

from benchmarks.gpu import correctness, day, decode, model, pack
from benchmarks.gpu.machine import Machine, WrongAnswer
from deltastore_kernels import cuda_build
from deltastore_kernels.ops.attend_decode import cuda, reference, triton
from tests.kernels.cuda.fiber_case import leave
from tests.kernels.cuda.modules import FiberModule, PagedDecode
from tests.net import gpu_store

ROOT = Path(__file__).parents[2]
TIMES = (*day.FIGURES[:-1], "bound_us", "medians")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("stage", day.STAGES)
def test_no_two_pieces_have_one_name(stage: str, device: str) -> None:
    """The second would be taken for done. Listing them needs no GPU."""
    listed = getattr(import_module(day.STAGES[stage].module), day.STAGES[stage].function)(Machine(device))
    names = [piece.name for piece in listed]
    assert names
    assert len(set(names)) == len(names)


def test_every_module_that_is_launched_is_packed() -> None:
    """Of one piece of each kind: those that name a case, and those of formats and head dims."""
    packed = {(made.format, made.head_dim) for made in pack.kernels()}
    cases = [case for case in correctness.DECODE if case.head_dim in cuda_build.HEAD_DIMS]
    assert {(case.fmt, case.head_dim) for case in cases} <= packed
    assert {(fmt, model.LLAMA_3_8B.head_dim) for fmt in model.FORMATS.values()} <= packed
    assert {(fmt, gpu_store.HEAD_DIM) for fmt in model.FORMATS.values()} <= packed


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage_to_its_end(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "benchmarks.gpu.day", "--rehearse", "--out", str(tmp_path), "--minutes", "20")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rows = rows_of(tmp_path)
    assert done.returncode == 0, done.stdout + "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    by_stage = {stage: [row for row in rows if row["stage"] == stage] for stage in day.STAGES}
    assert all(by_stage.values())
    for row in rows:
        assert row["status"] == ("absent" if row["stage"] == "served" else "ok"), row
        assert row["rehearsed"]
        assert not any(row.get(name) for name in TIMES), row
    for stage, kernels in (("correct", ("triton", "flashinfer")), ("decode", ("triton", "cuda", "sdpa", "flashinfer")),
                           ("graph", ("triton", "cuda")), ("model", ("triton", "cuda", "sdpa"))):  # fmt: skip
        for kernel in kernels:
            assert any(kernel in row["piece"] for row in by_stage[stage]), (stage, kernel)
    for what in ("decode", "shared prefix", "extend", "life", "rotate", "enter", "encode", "decode pages"):
        assert any(row["piece"].startswith(what) for row in by_stage["correct"]), what
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert rows_of(tmp_path) == rows, "what has a row is not run again"


@pytest.fixture
def bad_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {
        "device": day.Stage("tests.kernels.gpu_day_pieces", 20),
        "decode": day.Stage("tests.kernels.gpu_day_pieces", 40, "breaks_before_its_first"),
    }
    monkeypatch.setattr(day, "STAGES", stages)


def command_of(stage: str, folder: Path) -> list[str]:
    """A stage's process that knows the bad stages."""
    code = (
        "import sys; from benchmarks.gpu import day, machine\n"
        "machine._stand_in = lambda: None\n"
        f"day.STAGES = {day.STAGES!r}\n".replace("Stage(", "day.Stage(")
        + f"sys.exit(day.main(['--out', {str(folder)!r}, '--rehearse', '--only', {stage!r}]))"
    )
    return [sys.executable, "-c", code, "--rehearse"]


def test_a_stage_survives_all_that_its_pieces_do(bad_stages: None, tmp_path: Path) -> None:
    rows, command = day.Rows(tmp_path / "rows.jsonl"), command_of("device", tmp_path)
    environ = day.environment(rehearse=True)
    assert day.turn("device", rows, 30, command, environ) == 2, "it hangs, and has not had a whole turn"
    status = {row["piece"]: (row["status"], row.get("us")) for row in rows.read()}
    assert status == {"good": ("ok", 10.0), "raises": ("failed", None), "dies": ("failed", None),
                      "absent": ("absent", None), "wrong": ("failed", None)}  # fmt: skip
    assert "ended with 9" in next(row["error"] for row in rows.read() if row["piece"] == "dies")
    begin = time.monotonic()
    assert day.turn("device", rows, 15, command, environ) == 1
    assert time.monotonic() - begin < 60, "it was stopped, not waited for"
    assert "longer than" in rows.read()[-1]["error"]
    assert day.turn("device", rows, 30, command, environ) == 0
    assert [row["piece"] for row in rows.read()][-2:] == ["hangs", "last"]
    assert "2 ok" in day.summary(rows.read(), day.Counter())


def test_a_stage_that_cannot_begin_says_why(bad_stages: None, tmp_path: Path) -> None:
    rows, command = day.Rows(tmp_path / "rows.jsonl"), command_of("decode", tmp_path)
    for _ in range(2):
        assert day.turn("decode", rows, 60, command, day.environment(rehearse=True)) == 0
    assert "RuntimeError: no list" in rows.read()[-1]["error"]


def test_rows_of_an_earlier_call_are_kept_and_failures_run_again(tmp_path: Path, monkeypatch) -> None:
    earlier = day.Rows(tmp_path / "earlier" / "rows.jsonl")
    good, bad = ({"stage": "device", "piece": name, "status": name, "rehearsed": True, "error": name}
                 for name in (day.OK, day.FAILED))  # fmt: skip
    earlier.add(good, bad)
    monkeypatch.setattr(day, "turn", lambda *_: 0)
    for again, kept in (((), [good, bad]), (("--again",), [good])):
        out = tmp_path / f"new{len(again)}"
        day.main(["--rehearse", "--out", str(out), "--after", str(earlier.path), *again])
        assert rows_of(out) == kept


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert day.main(["--out", str(tmp_path)]) == 1
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_what_is_missing_is_said_at_once(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(day, "NEEDED", ("torch", "no_such_package"))
    assert day.main(["--out", str(tmp_path)]) == 1
    assert "no_such_package not installed" in capsys.readouterr().err


@pytest.fixture
def contestants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that decode's pieces call, without a GPU and in no interpreter."""
    monkeypatch.setattr(cuda_build, "load", FiberModule)
    monkeypatch.setattr(cuda, "leave", leave)
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 8)
    monkeypatch.setattr(triton, "DecodePlan", reference.DecodePlan)
    monkeypatch.setattr(flashinfer, "BatchDecodeWithPagedKVCacheWrapper", PagedDecode)
    monkeypatch.setattr(Machine, "us", lambda *_arguments: 10.0)


SHAPE = decode.Shape(batch=2, context_tokens=128, kv_heads=2, gqa=4, head_dim=64)
NAMES = [decode.SDPA, *decode.FLASHINFER, "cuda K4V2", "cuda raw", "triton K3V2"]


@pytest.mark.parametrize("name", NAMES)
def test_every_contestant_is_checked_and_held_against_its_bytes(name: str, contestants: None) -> None:
    row = decode.measure(name, SHAPE, Machine("cpu", bytes_per_us=1e4))
    assert 0 < row["error"] <= decode.LARGEST_ERROR
    assert row["us"] == 10.0
    assert row["bound_us"] == row["bytes"] / 1e4
    assert row["x_of_bound"] == 10.0 / row["bound_us"]
    if name == decode.SDPA:
        assert row["bytes"] == 2 * 128 * 2 * 4 * 64


@pytest.mark.parametrize("wrong", [1.05, float("nan")])
def test_a_wrong_answer_has_no_time(wrong: float, contestants: None, monkeypatch) -> None:
    right = cuda.DecodePlan.run
    monkeypatch.setattr(cuda.DecodePlan, "run", lambda *arguments: (right(*arguments)[0] * wrong, None))
    with pytest.raises(WrongAnswer, match="cuda K4V2"):
        decode.measure("cuda K4V2", SHAPE, Machine("cpu"))
