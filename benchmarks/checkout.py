"""Another checkout of DeltaStore in the same run: what a change cost, or brought."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def environ_of(checkout: Path) -> dict[str, str]:
    """The environment in which a process runs the code of another checkout. Raises SystemExit where it would not."""
    folders = [str(folder.resolve()) for folder in (checkout, checkout / "kernels")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}
    code = (
        "import sglang_deltastore, deltastore_kernels.native as n; print(sglang_deltastore.__file__, n.library()._name)"
    )
    found = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    if found.returncode or any(not path.startswith(folders[0]) for path in found.stdout.split()):
        raise SystemExit(
            f"--against {checkout}: must be a checkout of DeltaStore with compiled kernels (python setup.py build_ext "
            f"--inplace); found {found.stdout or found.stderr[-500:]}"
        )
    return environ
