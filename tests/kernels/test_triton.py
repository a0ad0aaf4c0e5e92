"""The Triton kernels' tests, each file in a process of its own: Triton asks once, when it is imported, whether kernels
are interpreted. In the interpreter on the CPU, always; compiled on a GPU where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltastore_kernels.ops.rotate.triton import rotate

HERE = Path(__file__).parent
FILES = ("triton_codec.py", "triton_step.py", "triton_attend.py")


def run_file(file: str, **environment: str) -> None:
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(HERE / file))
    done = subprocess.run(
        command, cwd=HERE.parent.parent, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout, done.stdout
    print(done.stdout)


@pytest.mark.parametrize("file", [*FILES[:2], pytest.param(FILES[2], marks=pytest.mark.slow)])
def test_in_the_interpreter(file: str) -> None:
    run_file(file, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the Triton kernels ran in the interpreter alone")
@pytest.mark.parametrize("file", FILES)
def test_on_a_gpu(file: str) -> None:
    run_file(file, TRITON_INTERPRET="0")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels")
def test_a_tensor_on_the_cpu_is_refused_without_a_gpu_or_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        rotate(torch.zeros(2, 64))
