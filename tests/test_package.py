"""What pip installs: which packages it asks for, which files it holds, and that it serves without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sglang_deltastore import __version__
from sglang_deltastore.policy.tiers import DEFAULT_TIER
from tests.e2e.conftest import BASE_ARGUMENTS, DELTASTORE, UNCALIBRATED
from tests.test_imports import MODULES, imports_of

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
LOCKED = {
    canonicalize_name(name): version
    for name, _, version in (line.partition("==") for line in (ROOT / "requirements.lock").read_text().splitlines())
    if version
}
#: what a wheel is made of
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "sglang_deltastore", "kernels")


def copied_sources(folder: Path) -> Path:
    """The sources without what was compiled in the checkout: building leaves files beside them."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def run(*command: str | Path, timeout_s: int = 600, **options: object) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, timeout=timeout_s, **options
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


# ---- what it asks for ----
def asked_for(lines: list[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("extra", [None, "lab", "fleet", "demo"])
def test_an_sglang_that_is_there_stays_as_it_is(extra: str | None) -> None:
    """Lower ends alone, which what SGLang pins and what the lock holds are above."""
    pins = {
        canonicalize_name(pin.name): pin
        for pin in asked_for(requires("sglang") or [])
        if pin.marker is None or pin.marker.evaluate({"extra": ""})
    }
    for needed in asked_for(EXTRAS[extra] if extra else PROJECT["dependencies"]):
        name = canonicalize_name(needed.name)
        assert {part.operator for part in needed.specifier} == {">="}, needed
        assert needed.specifier.contains(LOCKED[name]), f"{needed}: the lock has {LOCKED[name]}"
        for part in pins[name].specifier if name in pins else ():
            if part.operator == "==":
                assert needed.specifier.contains(part.version), f"{needed}: SGLang pins {part}"


def test_the_lock_holds_all_that_developing_needs() -> None:
    for needed in asked_for(EXTRAS["dev"]):
        if needed.name == PROJECT["name"]:
            assert needed.extras == set(EXTRAS) - {"dev"}
        else:
            assert str(needed.specifier) == f"=={LOCKED[canonicalize_name(needed.name)]}", needed


EXTRA_OF_ROOM = {"host": "demo", "lab": "lab", "fleet": "fleet"}


def test_every_import_is_asked_for() -> None:
    """By the core, or by the extra that the room is for; or SGLang, torch or transformers cannot be without it."""
    brought = [*(line for name in ("sglang", "torch", "transformers") for line in requires(name) or [])]
    core = {canonicalize_name(needed.name) for needed in asked_for([*PROJECT["dependencies"], *brought])}
    core |= {"torch", "transformers"}
    owners = packages_distributions()
    for module, path in MODULES.items():
        extra = EXTRA_OF_ROOM.get(module.split(".")[1] if "." in module else "")
        allowed = core | {canonicalize_name(needed.name) for needed in asked_for(EXTRAS[extra] if extra else [])}
        for name in imports_of(module, path.read_text(), path.name == "__init__.py"):
            top = name.split(".")[0]
            if top in ("sglang_deltastore", "deltastore_kernels") or top in sys.stdlib_module_names:
                continue
            assert {canonicalize_name(owner) for owner in owners[top]} & allowed, f"{module} imports {top}"


# ---- a command whose extra is missing ----
@pytest.mark.parametrize(
    ("command", "missing", "says"),
    [
        (["demo"], "openai", "needs openai, which is not installed; run: pip install 'sglang-deltastore[demo]'"),
        (
            ["plan", "--model", "Llama-3-8B", "--gpu", "MI300X", "--users", "9", "--picture", "a.svg"],
            "matplotlib",
            "needs matplotlib, which is not installed; run: pip install 'sglang-deltastore[fleet]'",
        ),
        (["top"], "rich", "needs rich, which is not installed; run: pip install 'sglang-deltastore'"),
    ],
)
def test_a_missing_package_is_one_sentence(command: list[str], missing: str, says: str, tmp_path: Path) -> None:
    """Whether the command's module imports it or something that it calls."""
    done = without(missing, command, tmp_path)
    assert (done.returncode, done.stderr) == (1, f"deltastore {command[0]}: {says}\n")


def test_a_missing_module_of_ours_is_no_missing_package(tmp_path: Path) -> None:
    done = without("sglang_deltastore.observe.dashboard", ["top"], tmp_path)
    assert "ModuleNotFoundError" in done.stderr and "pip install" not in done.stderr


def without(missing: str, command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """`deltastore` with these arguments, where a module cannot be imported."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from sglang_deltastore import cli; sys.exit(cli.main({command}))"
    )
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip


# ---- which files it holds ----
def sources_of(package: Path) -> set[str]:
    """Files of a package as a wheel names them."""
    ignored = (".pyc", ".so")
    return {
        str(path.relative_to(package.parent))
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in ignored
    }


def needed_files() -> set[str]:
    kernels = ROOT / "kernels"
    cuda = {
        f"deltastore_kernels/{path.relative_to(kernels)}"
        for folder in ("cuda", "include")
        for path in (kernels / "csrc" / folder).rglob("*")
        if path.is_file()
    }
    return sources_of(ROOT / "sglang_deltastore") | sources_of(kernels / "deltastore_kernels") | cuda


def test_every_file_of_ours_is_installed(tmp_path: Path) -> None:
    sources = copied_sources(tmp_path)
    run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built", cwd=sources)
    built = {str(path.relative_to(sources / "built")) for path in (sources / "built").rglob("*") if path.is_file()}
    assert built == needed_files(), "see package-data in pyproject.toml"
    for what in ("options.toml", "page.html", "models.toml", "attend_decode.cuh", "abi.h", "standin/sgl_kernel"):
        assert any(what in name for name in built), what


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an sdist, and of a wheel that was made from it: what `make wheel` makes."""
    sources = copied_sources(tmp_path_factory.mktemp("sources"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=sources)
    return sources / "dist"


@pytest.mark.slow
def test_the_wheel_is_for_every_python_of_this_platform(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"sglang_deltastore-{__version__}-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    assert held == needed_files() | {"deltastore_kernels/_cpu.so"}


@pytest.mark.slow
def test_the_sdist_holds_all_sources_and_nothing_compiled(dist: Path) -> None:
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "kernels" / "csrc").rglob("*") if path.is_file()}
    assert kernels <= held
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= held
    assert not [name for name in held if name.endswith(".so") or name.startswith("tests/")]


# ---- whether it serves without the checkout ----
@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that sees all packages of this one but ours."""
    folder = tmp_path_factory.mktemp("fresh")
    others = folder / "others"
    others.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "deltastore" not in entry.name:
            (others / entry.name).symlink_to(entry)
    run(sys.executable, "-m", "venv", folder / "venv")
    # Python 3.11 puts an old setuptools there, which would hide the other one.
    run(folder / "venv" / "bin" / "python", "-m", "pip", "uninstall", "-y", "setuptools")
    [packages] = (folder / "venv" / "lib").glob("python3*/site-packages")
    # addsitedir and not the path alone: some packages have .pth files of their own.
    (packages / "others.pth").write_text(f"import site; site.addsitedir({str(others)!r})\n")
    return folder


def alone(folder: Path) -> dict[str, str]:
    """Variables with which Python sees what is installed, and pip no index and no settings of this machine's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "VIRTUAL"))}
    path = f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONSAFEPATH": "1", "PIP_CONFIG_FILE": os.devnull}


SERVE = """
import json, sys
from pathlib import Path
import requests
from sglang_deltastore.host.server_process import serve

with serve(sys.argv[1], sys.argv[2:], log_path=Path("log")) as server:
    asked = {"text": 9 * "The capital of France is Paris. ", "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    answer = requests.post(server.url + "/generate", json=asked, timeout=120)
    answer.raise_for_status()
    print(json.dumps({"answer": answer.json()["text"], "stats": server.settled_stats().as_dict()}))
"""
FACTS = """
import json, sys
import deltastore_kernels, sglang_deltastore
from deltastore_kernels import native

files = [module.__file__ for module in (deltastore_kernels, sglang_deltastore)]
print(json.dumps({"files": [*files, str(native.LIBRARY)], "isa": native.isa(), "path": sys.path}))
"""


@pytest.mark.slow
def test_installed_beside_sglang_it_changes_nothing_and_serves(dist: Path, fresh: Path, smollm2: Path) -> None:
    python, environ = fresh / "venv" / "bin" / "python", alone(fresh)
    [wheel] = dist.glob("*.whl")
    with pytest.raises(AssertionError, match="No module named 'sglang_deltastore'"):
        run(python, "-c", "import sglang_deltastore", cwd=fresh, env=environ)
    # Without an index and with dependencies: this succeeds only where none is missing.
    run(python, "-m", "pip", "install", "--no-index", "--report", "report.json", wheel, cwd=fresh, env=environ)
    installed = [item["metadata"]["name"] for item in json.loads((fresh / "report.json").read_text())["install"]]
    assert installed == ["sglang-deltastore"]

    command = fresh / "venv" / "bin" / "deltastore"
    assert run(command, "--version", cwd=fresh, env=environ).strip() == f"deltastore {__version__}"
    found = json.loads(run(command, "doctor", "--json", cwd=fresh, env=environ))
    [kernels] = [finding["found"] for finding in found if finding["what"] == "kernels"]
    assert kernels.startswith("compiled for this CPU: ")

    facts = json.loads(run(python, "-c", FACTS, cwd=fresh, env=environ))
    assert all(Path(file).is_relative_to(fresh / "venv") for file in facts["files"])
    checkout = [folder for folder in facts["path"] if Path(folder or ".").resolve() in (ROOT, ROOT / "kernels")]
    assert not checkout and facts["isa"]

    served = json.loads(
        run(python, "-c", SERVE, smollm2, *BASE_ARGUMENTS, *UNCALIBRATED, *DELTASTORE, cwd=fresh, env=environ)
    )
    assert served["answer"] and served["stats"]["tier"] == DEFAULT_TIER
    assert served["stats"]["stored_tokens"] > 0
