"""The images, as far as can be checked where no Docker engine runs: lint, references, and the commands themselves."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

from sglang_deltastore.cli import COMMANDS
from sglang_deltastore.policy.refusals import SERVED_DEVICES, TESTED_VERSIONS
from tests.test_package import needed_files

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
SERVE = ROOT / "docker" / "serve.sh"
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()

each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


def parsed(dockerfile: Path) -> DockerfileParser:
    return DockerfileParser(fileobj=io.BytesIO(dockerfile.read_bytes()), env_replace=True)


def values(dockerfile: Path, *instructions: str) -> list[str]:
    """The values of these instructions, in order."""
    return [one["value"] for one in parsed(dockerfile).structure if one["instruction"] in instructions]


def copied(dockerfile: Path) -> list[str]:
    """What is copied out of the build context."""
    lines = [shlex.split(line) for line in values(dockerfile, "COPY", "ADD")]
    return [word for line in lines for word in line[:-1] if not word.startswith("--")]


def run(command: list[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)


def test_there_is_a_cpu_and_a_cuda_image() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@each_dockerfile
def test_lint(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    assert hadolint, "hadolint is not installed beside this Python; run: pip install -e '.[dev]'"
    found = run([hadolint, "--no-color", "--failure-threshold", "style", dockerfile])
    assert found.returncode == 0, found.stdout


@each_dockerfile
def test_every_base_has_a_version(dockerfile: Path) -> None:
    bases = parsed(dockerfile).parent_images
    assert bases
    for base in bases:
        tag = base.rpartition(":")[2]
        assert re.match(r"v?\d", tag) and "latest" not in tag, f"FROM {base}: a tag that says a version is needed"


def test_both_hold_the_sglang_that_was_tested() -> None:
    version = TESTED_VERSIONS[-1]
    assert parsed(ROOT / "docker/Dockerfile.cuda").parent_images == [f"lmsysorg/sglang:v{version}"]
    assert "requirements.lock" in copied(ROOT / "docker/Dockerfile.cpu")
    assert f"sglang=={version}" in (ROOT / "requirements.lock").read_text().split()


@each_dockerfile
def test_what_is_copied_is_there_and_in_the_build_context(dockerfile: Path) -> None:
    exceptions = [index for index, line in enumerate(IGNORED) if line.startswith("!")]
    assert IGNORED.index("*") < exceptions[0], ".dockerignore leaves out everything, then names the exceptions"
    for source in copied(dockerfile):
        assert (ROOT / source).exists(), f"COPY {source}: not in the repository"
        assert f"!{source}" in IGNORED, f"COPY {source}: .dockerignore leaves it out of the build context"


def commands(dockerfile: Path) -> str:
    """All that an image runs, at build and at start, with the script that its entry point is."""
    assert values(dockerfile, "ENTRYPOINT") == ['["serve"]']
    assert "--chmod=755 docker/serve.sh /usr/local/bin/serve" in values(dockerfile, "COPY")
    lines = values(dockerfile, "RUN", "CMD", "ENTRYPOINT", "HEALTHCHECK") + SERVE.read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


@each_dockerfile
def test_every_command_is_one_that_exists(dockerfile: Path) -> None:
    subcommands = re.findall(r"(?:^|[\s(])deltastore +(\w+)", commands(dockerfile), re.M)
    assert {"env", "model", "doctor"} <= set(subcommands)
    assert set(subcommands) <= {command.name for command in COMMANDS}
    modules = re.findall(r"python3? -m +([\w.]+)", commands(dockerfile))
    assert {"pip", "sglang.launch_server"} == set(modules)
    assert _module_file("sglang.launch_server").is_file()


def _module_file(module: str) -> Path:
    """Where a module would be, found without importing its package."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    assert spec is not None and spec.submodule_search_locations, f"{top} is not installed"
    return Path(spec.submodule_search_locations[0], *rest).with_suffix(".py")


def test_the_cpu_image_runs_without_rights() -> None:
    user = values(ROOT / "docker/Dockerfile.cpu", "USER")[-1]
    assert user.isdecimal() and int(user) > 0
    assert f"useradd --uid {user} " in commands(ROOT / "docker/Dockerfile.cpu")


def test_each_image_serves_on_its_device(tmp_path: Path) -> None:
    for name, device in (("cpu", "cpu"), ("cuda", "cuda")):
        environ = parsed(ROOT / f"docker/Dockerfile.{name}").envs
        assert "CUDA_VISIBLE_DEVICES" not in environ
        command = serve(tmp_path, **{key: value for key, value in environ.items() if key == "DEVICE"}).stdout.split()
        assert command[command.index("--device") + 1] == device


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """What the WORKDIR of Dockerfile.cuda holds before it installs our package."""
    folder = tmp_path / "deltastore"
    folder.mkdir()
    for source in copied(ROOT / "docker/Dockerfile.cuda"):
        if (ROOT / source).is_dir():
            shutil.copytree(
                ROOT / source, folder / source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
            )
        else:
            shutil.copy(ROOT / source, folder)
    return folder


def test_what_is_copied_makes_the_whole_package(context: Path) -> None:
    """The images install from a copy of some files, not from the checkout that tests see."""
    for dockerfile in DOCKERFILES:
        assert set(copied(dockerfile)) - {"requirements.lock"} == set(copied(ROOT / "docker/Dockerfile.cuda"))
        assert re.search(r"-m pip install .*--no-deps .* \.$", commands(dockerfile), re.M)
    built = run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"], cwd=context)
    assert built.returncode == 0, built.stderr
    packed = {str(path.relative_to(context / "built")) for path in (context / "built").rglob("*") if path.is_file()}
    assert packed == needed_files(), "files of ours that pip does not install: see package-data in pyproject.toml"


def test_the_cuda_image_installs_our_dependencies_but_no_sglang(context: Path) -> None:
    lines = values(ROOT / "docker/Dockerfile.cuda", "RUN")
    [picks] = [line.split("&&")[0] for line in lines if "tomllib" in line]
    assert run(["sh", "-c", picks.replace("python3", sys.executable)], cwd=context).returncode == 0
    needed = (context / "needed.txt").read_text().split()
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [*needed, f"sglang>={TESTED_VERSIONS[-1]}"] == [*declared[1:], declared[0]]


STUB = """#!/bin/sh
case "$0 ${1:-}" in
*/deltastore\\ env) printf %s "$ENV_SAYS"; exit "$ENV_CODE" ;;
*/deltastore\\ dtype) echo float32 ;;
*/deltastore\\ model) echo "/models/a b"; exit "$MODEL_CODE" ;;
*/python3*) printf '%s\\n' "$PYTHONPATH" "$@" ;;
*) exit 99 ;;
esac
"""


def serve(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """serve.sh, with stubs for the two programs that it runs."""
    for name in ("deltastore", "python3"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    says = {"ENV_SAYS": "export PYTHONPATH='/stand in'\n", "ENV_CODE": "0", "MODEL_CODE": "0"} | environ
    return run([SERVE, *arguments], env={"PATH": f"{folder}:{os.environ['PATH']}", **says})


def test_serve_starts_sglang_with_our_variables_model_and_flags(tmp_path: Path) -> None:
    done = serve(tmp_path)
    assert done.returncode == 0, done.stderr
    python_path, *command = done.stdout.splitlines()
    assert python_path == "/stand in"
    assert command[:4] == ["-m", "sglang.launch_server", "--model-path", "/models/a b"]
    assert command[command.index("--kv-compress") + 1] == "deltastore"
    assert command[command.index("--dtype") + 1] == "float32"
    assert command[command.index("--device") + 1] in SERVED_DEVICES
    exposed = {port for path in DOCKERFILES for port in values(path, "EXPOSE")}
    assert exposed == {command[command.index("--port") + 1]}

    fields = runpy.run_path(str(_module_file("sglang.srt.arg_groups.field_order")))["POSITIONAL_FIELD_ORDER"]
    for option in {word for word in command if word.startswith("--")} - {"--kv-compress"}:
        assert option.removeprefix("--").replace("-", "_") in fields, f"SGLang has no {option}"


def test_serve_takes_another_model_and_more_arguments(tmp_path: Path) -> None:
    done = serve(tmp_path, "--port", "1 2", MODEL="some/model", MODEL_CODE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["--port", "1 2"]
    assert "some/model" in done.stdout.splitlines()


@pytest.mark.parametrize("failing", ["ENV_CODE", "MODEL_CODE"])
def test_serve_starts_nothing_when_something_is_missing(tmp_path: Path, failing: str) -> None:
    done = serve(tmp_path, **{failing: "3"})
    assert (done.returncode, done.stdout) == (3, "")
