"""Apply this folder's git patches to an SGLang, or take them out again.

    python patches/apply.py                      # the SGLang that this Python finds
    python patches/apply.py --check              # what would be done; changes nothing
    python patches/apply.py --reverse
    python patches/apply.py --target FORK/python # a checkout: the folder that holds the package `sglang`

All or nothing: when one patch does not fit, no file is touched. Doing it twice is the same as once.
Needs git and the Python standard library; imports neither SGLang nor this project.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

PATCHES = Path(__file__).resolve().parent

STRIP_COMPONENTS = 2
"""Paths are those of SGLang's repository, a/python/sglang/...; below a target they start at sglang/."""


class PatchError(Exception):
    """A patch cannot be applied or reversed; the message says what to do."""


class State(Enum):
    """How a target stands to a patch."""

    IN = "is applied"
    OUT = "is not applied"
    NEITHER = "fits neither way"


@dataclass(frozen=True)
class Standing:
    """One patch and how the target stands to it; `reason` is git's, for a patch that fits neither way."""

    patch: Path
    state: State
    reason: str


def main(argv: Sequence[str] | None = None) -> int:
    """Do what `argv` (default: this process's arguments) says; returns the exit code."""
    parser = argparse.ArgumentParser(description="Apply DeltaStore's patches to an SGLang, or take them out again.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="say what would be done and change nothing")
    mode.add_argument("--reverse", action="store_true", help="take the patches out again")
    parser.add_argument(
        "--target", type=Path, metavar="DIR",
        help="the folder that holds the package sglang: site-packages, or python/ of a checkout "
        "(default: where this Python finds sglang)",
    )  # fmt: skip
    parser.add_argument(
        "--sglang-version", metavar="VERSION",
        help="the target's version, for a checkout that was never built and so does not say its own",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        target = (args.target or installed_target()).resolve()
        patches = patches_for(args.sglang_version or version_of(target))
        wanted = State.OUT if args.reverse else State.IN
        for line in bring_to(wanted, target, patches, dry_run=args.check):
            print(line)
    except PatchError as error:
        print(f"patches/apply.py: {error}", file=sys.stderr)
        return 1
    return 0


def installed_target() -> Path:
    """The folder that holds the installed package `sglang`, found without importing it."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise PatchError(f"found no sglang in {sys.prefix}; need one to patch: install it, or pass --target DIR")
    return Path(spec.submodule_search_locations[0]).parent


def version_of(target: Path) -> str:
    """The version that the build of SGLang in `target` wrote down."""
    file = target / "sglang" / "_version.py"
    if not (target / "sglang").is_dir():
        raise PatchError(f"--target {target}: it holds no folder sglang; pass the folder that does")
    found = re.search(r"^__version__.*=\s*['\"]([^'\"]+)['\"]", file.read_text(), re.M) if file.is_file() else None
    if found is None:
        raise PatchError(f"{file}: found no version there; pass it as --sglang-version, one of {known_versions()}")
    return found[1]


def known_versions() -> list[str]:
    return sorted(folder.name.removeprefix("sglang-") for folder in PATCHES.glob("sglang-*"))


def patches_for(version: str) -> list[Path]:
    """The patches for that version of SGLang, in the order of their numbers."""
    if version not in known_versions():
        raise PatchError(
            f"SGLang is version {version}; there are patches for {', '.join(known_versions())}; install one of "
            f"these, or port the patches (patches/README.md says how) into a folder sglang-{version}"
        )
    return sorted((PATCHES / f"sglang-{version}").glob("*.patch"))


def bring_to(wanted: State, target: Path, patches: list[Path], dry_run: bool) -> list[str]:
    """Apply or reverse what is not yet as `wanted`; returns a line on each patch.

    Raises PatchError, with nothing touched, when a patch fits neither way.
    """
    standings = [standing(patch, target) for patch in patches]
    misfits = [one for one in standings if one.state is State.NEITHER]
    if misfits:
        raise PatchError("\n".join(_misfit(one, target) for one in misfits) + "\nNothing was changed.")
    lines = []
    for one in standings:
        if one.state is wanted:
            lines.append(f"{one.patch.name}: already so, {one.state.value}")
            continue
        if not dry_run:
            _change(one.patch, target, reverse=wanted is State.OUT)
        lines.append(f"{one.patch.name}: {'would be ' if dry_run else ''}{_DONE[wanted]}")
    return lines


_DONE = {State.IN: "applied", State.OUT: "reversed"}


def standing(patch: Path, target: Path) -> Standing:
    """Whether `patch` is in `target`; changes nothing."""
    if git_apply(patch, target, "--check", "--reverse").returncode == 0:
        return Standing(patch, State.IN, "")
    forward = git_apply(patch, target, "--check")
    return Standing(patch, State.OUT if forward.returncode == 0 else State.NEITHER, forward.stderr.strip())


def _misfit(one: Standing, target: Path) -> str:
    return (
        f"{one.patch.name} can neither be applied to {target} nor reversed; git says:\n{one.reason}\n"
        "Allowed are the files as SGLang ships them, or with the patch applied: restore them "
        "(pip install --force-reinstall --no-deps sglang==VERSION, or git checkout) and try again; "
        "in a fork that changed these lines, merge the patch by hand (git apply --3way in its root)"
    )


def _change(patch: Path, target: Path, reverse: bool) -> None:
    done = git_apply(patch, target, *(["--reverse"] if reverse else []))
    if done.returncode != 0:
        raise PatchError(
            f"{patch.name} fitted {target}, but could not be written; git says:\n{done.stderr.strip()}\n"
            "Make that folder writable, or use the user who installed SGLang, and try again."
        )


def git_apply(patch: Path, target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `git apply` below `target`, as if no git repository were around it.

    Inside one, git would take the paths from that repository's root, find them outside the current
    folder, skip them, and report success. It looks for one in the folders above and in its
    environment variables.
    """
    git = shutil.which("git")
    if git is None:
        raise PatchError("found no git in PATH; git apply is needed: install git")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environ |= {"GIT_CEILING_DIRECTORIES": str(target.parent), "LC_ALL": "C"}
    environ |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}  # a user's apply.* settings
    command = [git, "apply", f"-p{STRIP_COMPONENTS}", "--whitespace=nowarn", *options, str(patch)]
    return subprocess.run(command, cwd=target, env=environ, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
