"""Building and loading the CUDA kernels (csrc/cuda): one module for each format and head_dim.

A module is built by FlashInfer's JIT when it is first asked for, and kept in FlashInfer's cache
(FLASHINFER_WORKSPACE_BASE) under a name with the hash of its sources. Machines without nvcc take modules built before:

    python -m deltastore_kernels.cuda_build --arch 9.0a --out DIR      then, when serving:  DELTASTORE_CUDA_MODULES=DIR
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from .layout import PACKED_BITS, RAW, Format

_HERE = Path(__file__).resolve().parent
SOURCES = _HERE / "csrc" if (_HERE / "csrc").exists() else _HERE.parent / "csrc"
"""Inside an installed package; beside it in a checkout."""
HEAD_DIMS = (64, 128, 256)
FORMATS = (*(Format(key, value) for key in PACKED_BITS for value in PACKED_BITS), RAW)
BUILT_MODULES = "DELTASTORE_CUDA_MODULES"
"""Environment variable: the folder of modules built ahead of time."""


class CudaUnavailable(RuntimeError):
    """There is no module, and none can be built here."""


@dataclass(frozen=True)
class Kernels:
    """Which kernels: one module's worth."""

    format: Format
    head_dim: int

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise CudaUnavailable(f"head_dim={self.head_dim}: the CUDA kernels know {HEAD_DIMS}; use Triton's")

    @property
    def defines(self) -> list[str]:
        numbers = {"KEY_BITS": self.format.key_bits, "VALUE_BITS": self.format.value_bits, "HEAD_DIM": self.head_dim}
        return [f"-DDELTASTORE_{name}={number}" for name, number in numbers.items()]

    @property
    def name(self) -> str:
        return f"deltastore_{self.format}_{self.head_dim}_{source_hash()}".lower()


def include_folders() -> list[Path]:
    return [SOURCES / "cuda", SOURCES / "include"]


@cache
def source_hash() -> str:
    """Of everything that a module is made of, but for FlashInfer and the compiler: their versions."""
    digest = hashlib.sha256()
    for path in sorted((*SOURCES.glob("cuda/*"), *SOURCES.glob("include/*/*"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def cuda_home() -> Path:
    """The folder of a CUDA toolkit: CUDA_HOME, that of nvcc on PATH, the pip package's. Raises CudaUnavailable."""
    if "CUDA_HOME" in os.environ:
        home = Path(os.environ["CUDA_HOME"])
        if not (home / "bin" / "nvcc").exists():
            raise CudaUnavailable(f"CUDA_HOME={home}: no bin/nvcc in it; set it to a CUDA toolkit's folder or unset it")
        return home
    candidates = [Path("/usr/local/cuda")]
    if on_path := shutil.which("nvcc"):
        candidates.insert(0, Path(on_path).resolve().parents[1])
    if (package := find_spec("nvidia")) and package.submodule_search_locations:
        roots = map(Path, package.submodule_search_locations)
        candidates += [home for root in roots for home in sorted(root.glob("cu[0-9]*"))]
    for home in candidates:
        # nvcc on PATH may be a script that stands for one elsewhere.
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    raise CudaUnavailable(
        "no CUDA compiler: looked for nvcc in CUDA_HOME, on PATH, in /usr/local/cuda and in the pip package "
        f"nvidia-cuda-nvcc; install one of them, or set {BUILT_MODULES} to a folder of modules built elsewhere "
        "(python -m deltastore_kernels.cuda_build --help), or serve with --kv-compress-kernels triton"
    )


@cache
def load(kernels: Kernels) -> ModuleType:
    """The module, built first if it has to be. Raises CudaUnavailable."""
    folder = os.environ.get(BUILT_MODULES)
    needed = ("tvm_ffi",) if folder else ("tvm_ffi", "flashinfer")  # one loads modules, the other builds them
    if any(find_spec(package) is None for package in needed):
        raise CudaUnavailable("the CUDA kernels need FlashInfer: pip install flashinfer-python; or use Triton's")
    import tvm_ffi

    if folder:
        library = Path(folder) / f"{kernels.name}.so"
        if not library.exists():
            raise CudaUnavailable(
                f"{BUILT_MODULES}={folder}: no {library.name} in it, which is what these sources need for "
                f"{kernels.format} and head_dim {kernels.head_dim}; build it: python -m deltastore_kernels.cuda_build"
            )
        return tvm_ffi.load_module(str(library))
    return tvm_ffi.load_module(str(build(kernels)))


def build(kernels: Kernels, verbose: bool = False) -> Path:
    """Builds a module in FlashInfer's cache if it is not there. Raises CudaUnavailable; takes some twenty seconds.

    The architectures are those of the GPUs here, or of FLASHINFER_CUDA_ARCH_LIST ("8.0 9.0a").
    """
    os.environ.setdefault("CUDA_HOME", str(cuda_home()))  # FlashInfer looks there and nowhere else in a venv
    try:
        return _build(kernels, verbose)
    # RuntimeError: what FlashInfer says of a failed build and of GPUs too old for it. The others: a compiler, linker or
    # ninja that is missing, or fails.
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        said = f"\n{error.stderr}" if isinstance(error, subprocess.CalledProcessError) and error.stderr else ""
        raise CudaUnavailable(
            f"building {kernels.name} failed: {error}{said}; install what is missing (nvcc, g++, ninja), or set "
            f"{BUILT_MODULES} to a folder of modules built elsewhere, or serve with --kv-compress-kernels triton"
        ) from error


def _build(kernels: Kernels, verbose: bool) -> Path:
    from flashinfer.jit.core import gen_jit_spec

    spec = gen_jit_spec(
        kernels.name,
        [SOURCES / "cuda" / "binding.cu"],
        extra_cuda_cflags=kernels.defines,
        extra_include_paths=include_folders(),
    )
    with tempfile.TemporaryDirectory() as stubs:
        folders = (os.environ.get("LIBRARY_PATH"), *_link_folders(stubs))
        os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
        spec.build(verbose=verbose)
    return spec.jit_library_path


def _link_folders(stubs: str) -> list[str]:
    """Where the linker finds the libraries that FlashInfer's link line names: the toolkit's, and for the driver's,
    which only a machine with a GPU has, an empty one. At run time the real one is found, or not needed."""
    command = ("g++", "-shared", "-x", "c++", "/dev/null", "-o", f"{stubs}/libcuda.so")
    subprocess.run(command, check=True, capture_output=True, text=True)
    for runtime in sorted(cuda_home().glob("lib*/libcudart.so*")):
        Path(stubs, "libcudart.so").unlink(missing_ok=True)
        Path(stubs, "libcudart.so").symlink_to(runtime)
    return [str(cuda_home() / "lib"), stubs]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deltastore_kernels.cuda_build",
        description="Build the CUDA kernels ahead of time, for images that have no compiler.",
        epilog=f"When serving, set {BUILT_MODULES} to the folder. One module takes some twenty seconds.",
    )
    parser.add_argument("--arch", nargs="+", required=True, metavar="A", help="architectures, e.g. 8.0 8.9 9.0a 10.0a")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the modules")
    parser.add_argument("--format", nargs="+", default=["all"], metavar="F", help="K4V2, raw, ..; all (default)")
    parser.add_argument(
        "--head-dim", nargs="+", type=int, default=HEAD_DIMS, metavar="D", help="64, 128, 256 (default: all)"
    )
    options = parser.parse_args(arguments)
    by_name = {str(fmt).lower(): fmt for fmt in FORMATS}
    wanted = list(by_name) if options.format == ["all"] else [name.lower() for name in options.format]
    if unknown := sorted(set(wanted) - set(by_name)):
        parser.error(f"--format {' '.join(unknown)}: known are {', '.join(map(str, FORMATS))}, all")
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = " ".join(options.arch)  # read when FlashInfer is imported
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for name in wanted:
            for head_dim in options.head_dim:
                library = build(Kernels(by_name[name], head_dim))
                print(shutil.copy2(library, options.out))
    except CudaUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
