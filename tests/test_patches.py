"""The patches apply to the installed SGLang's files, come out again, and do what they are for."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_deltastore import host
from sglang_deltastore.policy.config import Settings
from sglang_deltastore.policy.refusals import TESTED_VERSIONS
from sglang_deltastore.policy.tiers import DEFAULT_TIER

PATCHES = Path(__file__).resolve().parents[1] / "patches"
VERSION = TESTED_VERSIONS[-1]
PATCH_FILES = sorted((PATCHES / f"sglang-{VERSION}").glob("*.patch"))
FLAGS_PATCH = "0001-kv-compress-flags.patch"
VERSION_FILE = Path("sglang/_version.py")

MEMORY = Path("sglang/srt/arg_groups/fields/memory.py")
PIPELINE = Path("sglang/srt/arg_groups/pipeline.py")
HOOK = Path("sglang/srt/arg_groups/kv_compress_hook.py")

Tree = dict[str, bytes]


def installed() -> Path:
    """The folder that holds the installed SGLang, which is not imported."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations, "sglang is not installed"
    return Path(spec.submodule_search_locations[0]).parent


def touched() -> list[Path]:
    """Every file that a patch changes, makes or removes, below the folder that holds `sglang`."""
    found: set[str] = set()
    for patch in PATCH_FILES:
        found |= set(re.findall(r"^diff --git a/python/(\S+) ", patch.read_text(), re.M))
    return [Path(name) for name in sorted(found)]


def files_of(folder: Path) -> Tree:
    """The bytes of every file below `folder`, git's own left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def apply_tool(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PATCHES / "apply.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environ})


def git_init(folder: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)


def lay_out(target: Path) -> Path:
    """The touched files that the installed SGLang has, and what says its version, below `target`."""
    for name in [*touched(), VERSION_FILE]:
        source = installed() / name
        if source.exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)
    return target


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return lay_out(tmp_path / "site-packages")


def test_every_tested_version_has_its_folder_and_every_patch_its_ledger_entry() -> None:
    ledger = (PATCHES / "README.md").read_text()
    for version in TESTED_VERSIONS:
        assert (PATCHES / f"sglang-{version}").is_dir(), f"no patches for SGLang {version}"
    for patch in PATCHES.glob("sglang-*/*.patch"):
        assert f"`{patch.relative_to(PATCHES)}`" in ledger, f"{patch.name} is not in patches/README.md"


@pytest.mark.parametrize("place", ["alone", "below a repository", "root of a repository", "in a git hook"])
def test_apply_twice_and_reverse_twice(tmp_path: Path, place: str) -> None:
    """git takes paths from the root of a repository around it, and skips what it then does not find."""
    target = lay_out(tmp_path / "lib" / "site-packages")
    environ: dict[str, str] = {}
    if place == "below a repository":
        git_init(tmp_path)
    elif place == "root of a repository":
        git_init(target)
    elif place == "in a git hook":
        git_init(tmp_path)
        environ = {"GIT_DIR": str(tmp_path / ".git"), "GIT_WORK_TREE": str(tmp_path)}
    original = files_of(target)

    first = apply_tool("--target", target, **environ)
    patched = files_of(target)
    assert first.returncode == 0, first.stderr
    assert f"{FLAGS_PATCH}: applied" in first.stdout
    changed = {name for name in patched if patched[name] != original.get(name)}
    assert changed == {str(name) for name in touched()}

    again = apply_tool("--target", target, **environ)
    assert (again.returncode, files_of(target)) == (0, patched), again.stderr
    assert "already so, is applied" in again.stdout

    back = apply_tool("--target", target, "--reverse", **environ)
    assert (back.returncode, files_of(target)) == (0, original), back.stderr
    assert f"{FLAGS_PATCH}: reversed" in back.stdout

    again = apply_tool("--target", target, "--reverse", **environ)
    assert (again.returncode, files_of(target)) == (0, original), again.stderr
    assert "already so, is not applied" in again.stdout


def test_check_changes_nothing(target: Path) -> None:
    original = files_of(target)
    done = apply_tool("--target", target, "--check")
    assert (done.returncode, files_of(target)) == (0, original), done.stderr
    assert f"{FLAGS_PATCH}: would be applied" in done.stdout


def test_the_default_target_is_the_installed_sglang() -> None:
    done = apply_tool("--check")
    assert done.returncode == 0, done.stderr
    assert FLAGS_PATCH in done.stdout


def test_refuses_another_version(target: Path) -> None:
    file = target / VERSION_FILE
    file.write_text(file.read_text().replace(VERSION, "0.5.24"))
    original = files_of(target)
    done = apply_tool("--target", target)
    assert (done.returncode, files_of(target)) == (1, original)
    assert "SGLang is version 0.5.24" in done.stderr and VERSION in done.stderr and "port the patches" in done.stderr


def test_a_checkout_that_was_never_built_must_be_told_its_version(target: Path) -> None:
    (target / VERSION_FILE).unlink()
    original = files_of(target)
    done = apply_tool("--target", target)
    assert (done.returncode, files_of(target)) == (1, original)
    assert "--sglang-version" in done.stderr
    assert apply_tool("--target", target, "--sglang-version", VERSION).returncode == 0
    assert files_of(target) != original


def change_a_line(target: Path) -> None:
    file = target / PIPELINE
    file.write_text(file.read_text().replace("handle_hardware_runtime_validation", "handle_runtime"))


def apply_half(target: Path) -> None:
    apply_tool("--target", target)
    shutil.copy(installed() / MEMORY, target / MEMORY)


def take_the_new_name(target: Path) -> None:
    (target / HOOK).write_text("# a fork's own\n")


@pytest.mark.parametrize("spoil", [change_a_line, apply_half, take_the_new_name])
@pytest.mark.parametrize("options", [(), ("--check",), ("--reverse",)])
def test_refuses_other_files_and_touches_nothing(target: Path, spoil, options: tuple[str, ...]) -> None:
    spoil(target)
    spoilt = files_of(target)
    done = apply_tool("--target", target, *options)
    assert (done.returncode, files_of(target)) == (1, spoilt), done.stdout
    assert f"{FLAGS_PATCH} can neither be applied" in done.stderr
    assert "Allowed are the files as SGLang ships them" in done.stderr and "Nothing was changed" in done.stderr


def test_refuses_a_folder_without_sglang(tmp_path: Path) -> None:
    done = apply_tool("--target", tmp_path)
    assert done.returncode == 1
    assert "holds no folder sglang" in done.stderr


def overlay(source: Path, copy: Path, own: set[Path], below: Path = Path("sglang")) -> None:
    """`source`'s package as links below `copy`, with real files for `own` and real folders above them."""
    parents = {parent for name in own for parent in name.parents}
    (copy / below).mkdir(parents=True)
    for entry in (source / below).iterdir():
        name = below / entry.name
        if name in parents:
            overlay(source, copy, own, name)
        elif name in own:
            shutil.copy(entry, copy / name)
        elif entry.name != "__pycache__":
            (copy / name).symlink_to(entry)


PROBE = """
import argparse, json, pickle, sys
from pathlib import Path

from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang_deltastore.seam import flags, targets

GIVEN = ["--kv-compress", "deltastore", "--kv-compress-tier", "k4v2"]
BASE = ["--model-path", "dummy", "--device", "cpu"]  # "dummy": resolution ends before it needs a model
YAML = Path(sys.argv[1])
YAML.write_text("kv-compress: deltastore\\nkv-compress-tier: k4v2\\n")

def asked(record):
    settings = flags.settings_of(pickle.loads(pickle.dumps(record)))
    return [settings.mode, settings.tier_name]

def refusal(**fields):
    try:
        ServerArgs(model_path="dummy", device="cpu", **fields).resolve_once()
    except ValueError as error:
        return str(error)

def facts(make_record):
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    record = prepare_server_args(BASE + GIVEN)
    return {
        "options": [option for option in parser.format_help().split() if option == "--kv-compress-tier"],
        "given": asked(record),
        "yaml": asked(prepare_server_args(BASE + ["--config", str(YAML)])),
        "not given": asked(prepare_server_args(BASE)),
        "python": asked(make_record(model_path="dummy", kv_compress="deltastore", kv_compress_tier="k4v2")),
        "no tier": asked(make_record(model_path="dummy", kv_compress="deltastore")),
        "launch command": record.launch_command,
        "server info": record.resolved_dict()["kv_compress_tier"],
        "refusal": refusal(kv_compress="deltastore"),
        "refusal of none": refusal(),
    }

seen = {"file": sys.modules[ServerArgs.__module__].__file__, "last fields": ServerArgs.__struct_fields__[-7:]}
seen["without our hooks"] = facts(ServerArgs)
load_plugins()
from sglang.srt.entrypoints.engine import Engine
seen["missing hooks"] = targets.missing_hooks(targets.LAUNCHER_HOOKS)
seen["with our hooks"] = facts(Engine.server_args_class)
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_the_patched_sglang_knows_the_flags_itself(tmp_path: Path) -> None:
    """A whole SGLang, patched, before and after our plugin registers its hooks in it."""
    overlay(installed(), tmp_path, set(touched()))
    done = apply_tool("--target", tmp_path)
    assert done.returncode == 0, done.stderr
    environ = os.environ | host.variables(os.environ)
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), environ.get("PYTHONPATH", "")]))
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "server.yaml")],
        env=environ, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert probe.returncode == 0, probe.stderr[-3000:]
    seen = json.loads(probe.stdout.splitlines()[-1])

    assert Path(seen["file"]).is_relative_to(tmp_path), "the probe did not import the patched SGLang"
    ours = ["kv_compress", "kv_compress_tier", "kv_compress_calibration", "kv_compress_calibration_text",
            "kv_compress_kernels", "kv_compress_show_prompts", "kv_compress_canary"]  # fmt: skip
    assert seen["last fields"] == ours, "positional arguments have moved"
    assert seen["missing hooks"] == []
    without, with_hooks = seen["without our hooks"], seen["with our hooks"]
    assert "registered are []" in str(without.pop("refusal")), "asked for, nobody there to do it, and not refused"
    assert with_hooks.pop("refusal") is None
    off = Settings()
    for facts in (without, with_hooks):
        assert facts == {
            "options": ["--kv-compress-tier"],
            "given": ["deltastore", "k4v2"],
            "yaml": ["deltastore", "k4v2"],
            "not given": [off.mode, off.tier_name],
            "python": ["deltastore", "k4v2"],
            "no tier": ["deltastore", DEFAULT_TIER],
            "launch command": facts["launch command"],
            "server info": "k4v2",
            "refusal of none": None,
        }
        assert "--kv-compress-tier" in facts["launch command"]
