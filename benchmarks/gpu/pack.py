"""What gpu-day wants on a machine that has torch, triton and a GPU, but no network: into .gpu-day/, which git ignores
and which travels with a copy of the working tree.

    modules/   the CUDA kernels, built here for the GPU's architecture (deltastore_kernels.cuda_build)
    site/      the one package that loads them, apache-tvm-ffi, for that machine's Python
    commit     which commit the copy is of
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.gpu.correctness import CODEC, DECODE, EXTEND, SHARED
from benchmarks.gpu.day import PACKED
from benchmarks.gpu.decode import OTHER_HEADS, OURS
from benchmarks.provenance import ROOT, provenance
from deltastore_kernels import cuda_build
from deltastore_kernels.cuda_build import HEAD_DIMS, Kernels

MOST_BYTES = 64 << 20
"""Of the working tree with what was packed."""
PACKAGES = (f"apache-tvm-ffi=={version('apache-tvm-ffi')}", "typing_extensions")
"""What the modules are built for, and what it imports."""


def kernels() -> list[Kernels]:
    """All that gpu-day's pieces launch."""
    cases = [*DECODE, *(case for case, _ in (*SHARED, *EXTEND))]
    wanted = {(case.fmt, case.head_dim) for case in cases} | set(CODEC)
    wanted |= {(fmt, 128) for _, fmt in OURS.values()} | {(fmt, 64) for _, fmt in OURS.values()}
    wanted |= {(fmt, shape.head_dim) for _, fmt in OURS.values() for shape in OTHER_HEADS}
    return [Kernels(fmt, dim) for fmt, dim in sorted(wanted, key=str) if dim in HEAD_DIMS]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.pack", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=["9.0a"], metavar="A", help="default: %(default)s (H100, H200)")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="of that machine (default: %(default)s)")
    options = parser.parse_args(arguments)
    shutil.rmtree(PACKED, ignore_errors=True)
    site = PACKED / "site"
    install = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--target", site)
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28)]
    subprocess.run([*install, *platforms, f"--python-version={options.python}", *PACKAGES], check=True)
    for made in kernels():
        command = ("--arch", *options.arch, "--out", str(PACKED / "modules"), "--format", str(made.format))
        if cuda_build.main([*command, "--head-dim", str(made.head_dim)]):
            return 1
    (PACKED / "commit").write_text(provenance()["commit"])
    packed = sum(path.stat().st_size for path in PACKED.rglob("*") if path.is_file())
    everything = packed + tracked_bytes(ROOT)
    print(f"{PACKED}: {packed / 1e6:.1f} MB, {everything / 1e6:.1f} MB with the working tree")
    if everything > MOST_BYTES:
        print(f"that is more than {MOST_BYTES >> 20} MiB: pack for fewer --arch", file=sys.stderr)
        return 1
    return 0


def tracked_bytes(root: Path) -> int:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    return sum((root / name).stat().st_size for name in listed.split("\0") if name)


if __name__ == "__main__":
    sys.exit(main())
