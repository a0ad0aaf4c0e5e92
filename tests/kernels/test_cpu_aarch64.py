"""The portable kernels are valid, without a warning, for a CPU that this machine is not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = "aarch64-linux-gnu-g++"
SOURCES = sorted((Path(__file__).resolve().parents[2] / "kernels/csrc/cpu").glob("*.cpp"))
FLAGS = ["-std=c++17", "-fsyntax-only", "-fopenmp", "-Wall", "-Wextra", "-Werror"]
ISA = ["-DDELTASTORE_ISA=portable", '-DDELTASTORE_ISA_NAME="portable"', "-DDELTASTORE_ISAS(X)=X(portable)"]


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER} (Debian: g++-aarch64-linux-gnu)")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_for_aarch64(source: Path) -> None:
    command = [COMPILER, *FLAGS, *ISA, str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
