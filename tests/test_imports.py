"""Imports point one way, and importing us changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: what each room may import of the project besides itself
ROOMS: dict[str, set[str]] = {
    "deltastore_kernels": set(),
    "sglang_deltastore": set(),
    "sglang_deltastore.cache_folder": set(),
    "sglang_deltastore.policy": {"deltastore_kernels", "sglang_deltastore.cache_folder"},
    "sglang_deltastore.store": {"deltastore_kernels"},
    "sglang_deltastore.observe": {"deltastore_kernels"},
    "sglang_deltastore.host": {f"sglang_deltastore.{name}" for name in ("cache_folder", "observe", "policy")},
    "sglang_deltastore.fleet": {"deltastore_kernels", "sglang_deltastore.policy"},
    "sglang_deltastore.lab": {
        "deltastore_kernels",
        *(f"sglang_deltastore.{name}" for name in ("host", "policy", "store")),
    },
    "sglang_deltastore.seam": {
        "deltastore_kernels",
        *(f"sglang_deltastore.{name}" for name in ("host", "observe", "policy", "store")),
    },
    "sglang_deltastore.cli": set(),
}
MAY_IMPORT_SGLANG = {"sglang_deltastore.seam"}


def product_files() -> list[tuple[str, Path]]:
    """(dotted module name, file) of every module that users install."""
    found = []
    for package, folder in (("sglang_deltastore", ROOT), ("deltastore_kernels", ROOT / "kernels")):
        for path in sorted((folder / package).rglob("*.py")):
            if "standin" not in path.parts:
                parts = path.relative_to(folder).with_suffix("").parts
                found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


MODULES = dict(product_files())


def room_of(name: str) -> str:
    """The longest key of ROOMS that is `name` or a parent of it; a name that none holds is its own room."""
    parts = name.split(".")
    heads = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    found = next((head for head in heads if head in ROOMS), name)
    return name if found == "sglang_deltastore" and ".".join(parts[:2]) in MODULES else found


def imports_of(module: str, source: str, is_package: bool) -> set[str]:
    """Absolute names of everything that `source` imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names} | {origin}
    return names


def violations(module: str, source: str, is_package: bool) -> list[str]:
    room = room_of(module)
    wrong = []
    for name in imports_of(module, source, is_package):
        root = name.split(".")[0]
        if root == "sglang" and room not in MAY_IMPORT_SGLANG:
            wrong.append(f"{module} imports {name}: only the seam may")
        if root in ("tests", "benchmarks", "patches"):
            wrong.append(f"{module} imports {name}")
        if root in ("sglang_deltastore", "deltastore_kernels"):
            target = room_of(name)
            if target not in (room, "sglang_deltastore") and target not in ROOMS[room]:
                wrong.append(f"{module} imports {name}: {room} may import {sorted(ROOMS[room])}")
    return wrong


@pytest.mark.parametrize(("module", "path"), product_files(), ids=lambda value: str(value).split("/")[-1])
def test_imports_point_one_way(module: str, path: Path) -> None:
    assert violations(module, path.read_text(), path.name == "__init__.py") == []


def test_every_module_has_a_room() -> None:
    assert {room_of(module) for module in MODULES} == set(ROOMS)


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none: an empty list."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """A package's __init__ gathers what lies below it: an import of it from below is no arrow of its own."""
    found = {
        module: {
            name
            for name in imports_of(module, path.read_text(), path.name == "__init__.py") & MODULES.keys()
            if not f"{module}.".startswith(f"{name}.")
        }
        for module, path in MODULES.items()
    }
    assert circle(found) == []
    assert circle(found | {"deltastore_kernels.layout": {"sglang_deltastore.store.pages"}})


def test_no_two_modules_have_one_name() -> None:
    """But for a package's __init__ and an operation's backends."""
    names = Counter(
        path.stem for path in MODULES.values() if path.name != "__init__.py" and path.parents[1].name != "ops"
    )
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("deltastore_kernels.layout", "from sglang_deltastore.store import pages"),
        ("sglang_deltastore.store.pages", "import sglang"),
        ("sglang_deltastore.store.pages", "from ..seam import targets"),
        *((f"sglang_deltastore.store.{name}", "from ..observe import guard") for name in ("pages", "sinks", "steps")),
        *(("sglang_deltastore.observe.stats", f"from .. import {name}") for name in ("policy", "seam", "store")),
        ("sglang_deltastore.policy.tiers", "from ..store import size"),
        ("sglang_deltastore.observe.nodes", "def later():\n    import sglang"),
        ("sglang_deltastore.store.steps", "def later():\n    from sglang.srt import utils"),
        ("sglang_deltastore.host.demo.demo_command", "from tests import budgets"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert violations(module, source, is_package=False)


def test_importing_the_package_loads_neither_torch_nor_sglang() -> None:
    code = (
        "import sys, sglang_deltastore, sglang_deltastore.cli; sys.exit(bool({'torch', 'sglang'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
