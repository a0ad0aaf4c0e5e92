"""Compiles the CPU kernels into one plain shared library, deltastore_kernels/_cpu.so, and packs the CUDA sources.

Everything else about the package is in pyproject.toml. The kernels are compiled once for each
instruction set and chosen at run time; the library needs neither Python nor torch, and
deltastore_kernels/native.py binds it. Without a C++ compiler the package installs all the same,
and runs on its torch reference operations.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CSRC = Path("kernels/csrc")
#: compiled for each instruction set / once, for the baseline CPU
PER_ISA = [
    "isa.cpp",
    "attend_segment.cpp",
    "decode_tile.cpp",
    "encode_tile.cpp",
    "raw_rows.cpp",
    "read_bytes.cpp",
    "rotate_rows.cpp",
]
ONCE = ["attend.cpp", "store_tokens.cpp", "tiles.cpp", "library.cpp"]
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno"]  # the same bytes on every instruction set; sqrt inline
# gcc 12 warns about its own intrinsics (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593)
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c"
#: instruction set -> compiler flags, best first
X86 = {
    "amx": f"{AVX512} -mamx-tile -mamx-int8 -mamx-bf16",
    "avx512_vnni": AVX512,
    "avx2": "-mavx2 -mfma -mf16c",
}
#: gcc otherwise puts off additions until AVX2's 16 registers are full, and spills a hundred of them
TUNING = {"avx2": "-fno-tree-ter -fno-tree-reassoc"}


def isas(compiler: list[str]) -> dict[str, list[str]]:
    """Instruction sets that the compiler knows, with their flags."""
    x86 = X86 if platform.machine() in ("x86_64", "AMD64") else {}
    known = {name: flags.split() for name, flags in x86.items() if accepts(compiler, flags.split())}
    for name, flags in TUNING.items():
        if name in known and accepts(compiler, flags.split()):
            known[name] += flags.split()
    return known | {"portable": []}


def accepts(compiler: list[str], flags: list[str]) -> bool:
    command = [*compiler, *flags, "-Werror", "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class BuildLibrary(build_ext):
    """An extension without Python: no PyInit, no ABI tag in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        compiler = (os.environ.get("CXX") or "c++").split()
        if shutil.which(compiler[0]) is None:
            self.warn(f"no C++ compiler ({compiler[0]}): building without the CPU kernels; attention will be slow")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        objects_dir = Path(self.build_temp) / sysconfig.get_platform()
        objects_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        known = isas(compiler)
        declared = " ".join(f"X({name})" for name in known)
        jobs = [(name, "once", [f"-DDELTASTORE_ISAS(X)={declared}"]) for name in ONCE]
        for isa, isa_flags in known.items():
            names = [f"-DDELTASTORE_ISA={isa}", f'-DDELTASTORE_ISA_NAME="{isa}"']
            jobs += [(name, isa, [*isa_flags, *names]) for name in PER_ISA]
        extra = os.environ.get("DELTASTORE_CXXFLAGS", "").split()  # sanitizers
        objects = []
        for name, variant, flags in jobs:
            objects.append(str(objects_dir / f"{Path(name).stem}.{variant}.o"))
            run([*compiler, *FLAGS, *flags, *extra, "-c", str(CSRC / "cpu" / name), "-o", objects[-1]])
        run([*compiler, "-shared", "-fopenmp", *extra, *objects, "-o", str(target)])


class CopySources(build_py):
    """What the CUDA kernels are made of goes into the package: FlashInfer compiles it on the user's machine."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("cuda", "include"):
                target = Path(self.build_lib) / "deltastore_kernels" / CSRC.name / folder
                shutil.copytree(CSRC / folder, target, dirs_exist_ok=True)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python of a platform: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def run(command: list[str]) -> None:
    """Run a compiler; what it says goes to the terminal, and a failure ends the build with the command."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.stderr:
        print(result.stderr)
    if result.returncode:
        raise SystemExit(f"compiling the CPU kernels failed (message above):\n  {' '.join(command)}")


headers = [str(path) for path in sorted(CSRC.rglob("*.h"))]
setup(
    ext_modules=[
        Extension(
            "deltastore_kernels._cpu",
            sources=[str(CSRC / "cpu" / name) for name in (*PER_ISA, *ONCE)],
            depends=headers,
        )
    ],
    cmdclass={"bdist_wheel": PlatformWheel, "build_ext": BuildLibrary, "build_py": CopySources},
)
