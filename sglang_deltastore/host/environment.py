"""The environment in which SGLang starts on a machine without a GPU.

Two things are missing there. SGLang takes its CPU paths only if `SGLANG_USE_CPU_ENGINE` is 1 when it
is imported, and it imports `sgl_kernel`, whose published build needs the NVIDIA driver. Both must
hold in every process SGLang spawns too, so they travel as environment variables.

A `sgl_kernel` that loads is never shadowed. Whether it loads is found out in a child process: here,
a failed import would leave half-loaded modules behind, a successful one would initialize CUDA.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

STANDIN = Path(__file__).resolve().parent / "standin"
CPU_ENGINE_SWITCH = "SGLANG_USE_CPU_ENGINE"

_PROBE_TIMEOUT_S = 300  # importing torch from a cold disk takes a minute or more
_NO_GPU = 3
_GPU_PROBE = f"import sys, torch; sys.exit(0 if torch.cuda.is_available() else {_NO_GPU})"
_KERNELS_PROBE = "import sgl_kernel"


def needs_cpu_engine(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether SGLang must be told to run on the CPU, because torch finds no GPU under `environ`.

    Raises RuntimeError if torch itself cannot be asked.
    """
    if not _library_loads("libcuda.so.1") and not os.path.exists("/dev/kfd"):
        return True  # neither an NVIDIA driver nor an AMD one: not worth importing torch
    exit_code, errors = _run_probe(_GPU_PROBE, _probe_environ(environ))
    if exit_code not in (0, _NO_GPU):
        raise RuntimeError(
            f"Asking torch for a GPU failed with exit code {exit_code}: {errors[-500:]!r}. Expected 0 (found) or "
            f"{_NO_GPU} (none): repair torch in {sys.prefix} (does `python -c 'import torch'` work?)."
        )
    return exit_code == _NO_GPU


def needs_standin(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether SGLang must run on the CPU and no `sgl_kernel` loads under `environ`.

    Always false with a usable GPU: there a `sgl_kernel` that fails is an installation to repair.
    """
    if not needs_cpu_engine(environ):
        return False
    spec = PathFinder.find_spec("sgl_kernel", _search_path(environ))
    if spec is None:
        return True
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if any((folder / "sm100").is_dir() for folder in folders) and not _library_loads("libcuda.so.1"):
        return True  # the CUDA wheel links the driver: the answer of the probe, seconds sooner
    exit_code, _ = _run_probe(_KERNELS_PROBE, _probe_environ(environ))
    return exit_code != 0


def variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables to set over `environ` so that SGLang starts; empty with a usable GPU.

    Applying them twice is the same as once. A stand-in left over in `PYTHONPATH` is taken out again
    where a real `sgl_kernel` loads.
    """
    if not needs_cpu_engine(environ):
        return {}
    wanted = {CPU_ENGINE_SWITCH: "1"}
    present = environ.get("PYTHONPATH", "")
    foreign = _foreign_entries(present)
    if needs_standin(environ):
        wanted["PYTHONPATH"] = os.pathsep.join([str(STANDIN), *foreign])
    elif present and foreign != present.split(os.pathsep):
        wanted["PYTHONPATH"] = os.pathsep.join(foreign)
    return wanted


def activate() -> dict[str, str]:
    """Apply `variables()` to this process and to its future children; returns them.

    For users of SGLang's Python API; call it before the first `import sglang`. Calling it again, or
    in a process that was started with the variables, does nothing.

    Raises RuntimeError if SGLang is imported already: it has chosen its device paths by then.
    """
    wanted = variables(os.environ)
    standin_wanted = str(STANDIN) in wanted.get("PYTHONPATH", "").split(os.pathsep)
    path_ready = not standin_wanted or str(STANDIN) in sys.path
    if path_ready and all(os.environ.get(name) == value for name, value in wanted.items()):
        return wanted
    if "sglang" in sys.modules:
        raise RuntimeError(
            "cpu_host.activate() came after `import sglang`, which chooses its device paths at import: got an "
            "imported sglang, need a process without. Call activate() before the first import of sglang, or start "
            'Python after `eval "$(deltastore env)"`.'
        )
    os.environ.update(wanted)
    if not path_ready:
        sys.path.insert(0, str(STANDIN))
    return wanted


def _foreign_entries(python_path: str) -> list[str]:
    """The entries of a `PYTHONPATH` that are not the stand-in's folder."""
    entries = python_path.split(os.pathsep) if python_path else []
    return [entry for entry in entries if os.path.realpath(entry) != str(STANDIN)]


def _search_path(environ: Mapping[str, str]) -> list[str]:
    """Where a child started under `environ` finds modules, the stand-in left out."""
    return _foreign_entries(environ.get("PYTHONPATH", "")) + _foreign_entries(os.pathsep.join(sys.path))


def _probe_environ(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """`environ` without the stand-in, hashable."""
    python_path = os.pathsep.join(_foreign_entries(environ.get("PYTHONPATH", "")))
    return tuple(sorted({**environ, "PYTHONPATH": python_path}.items()))


@cache
def _run_probe(statements: str, environ_items: tuple[tuple[str, str], ...]) -> tuple[int, str]:
    """Exit code and stderr of `statements` in a fresh interpreter; remembered, as it takes seconds."""
    probe = subprocess.run(
        [sys.executable, "-c", statements],
        env=dict(environ_items),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=_PROBE_TIMEOUT_S,
    )
    return probe.returncode, probe.stderr


def _library_loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
