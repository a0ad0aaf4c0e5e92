"""Where a row comes from: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Facts to put into every row: versions of what is installed; the commit is that of the checkout, empty outside
    one."""
    return {
        "machine": _gpu_name() if device == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "versions": _versions("sglang", "torch", "transformers", "triton", "sglang-deltastore"),
        "commit": commit_of(Path(__file__).resolve().parents[2]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit_of(root: Path) -> str:
    """The checkout's commit, with "+changes" where files differ from it, other than results: a run writes its first
    rows before it measures the next. Empty where there is no checkout."""
    if not (root / ".git").exists():
        return ""
    commit, changes = (
        subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
        for arguments in (
            ("rev-parse", "--short", "HEAD"),
            ("status", "--porcelain", "--", ":(exclude)benchmarks/results"),
        )
    )
    return commit + ("+changes" if changes else "")
