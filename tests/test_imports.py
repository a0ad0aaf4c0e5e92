"""Imports point one way, and importing us changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: what each part of the project may import of the project, and whether it may import sglang
LAYERS: dict[str, set[str]] = {
    "deltastore_kernels": set(),
    "sglang_deltastore.provenance": set(),
    "sglang_deltastore.cache_folder": set(),
    "sglang_deltastore.tiers": {"deltastore_kernels"},
    "sglang_deltastore.config": {"sglang_deltastore.tiers"},
    "sglang_deltastore.options": {"deltastore_kernels", "sglang_deltastore.config"},
    "sglang_deltastore.refusals": {"deltastore_kernels", "sglang_deltastore.options"},
    "sglang_deltastore.layer_rules": {"sglang_deltastore.refusals"},
    "sglang_deltastore.request_rules": set(),
    "sglang_deltastore.sinks": {"deltastore_kernels"},
    "sglang_deltastore.writes": {"deltastore_kernels"},
    "sglang_deltastore.pool": {"deltastore_kernels", "sglang_deltastore.sinks", "sglang_deltastore.writes"},
    "sglang_deltastore.observe": {"deltastore_kernels"},
    "sglang_deltastore.calibration": {"deltastore_kernels", "sglang_deltastore.cache_folder"},
    "sglang_deltastore.kernel_choice": {"deltastore_kernels"},
    "sglang_deltastore.attention": {"deltastore_kernels", "sglang_deltastore.pool", "sglang_deltastore.writes"},
    "sglang_deltastore.cpu_host": {"sglang_deltastore", "sglang_deltastore.cache_folder"},
    "sglang_deltastore.server_process": {"sglang_deltastore.cpu_host", "sglang_deltastore.observe"},
    "sglang_deltastore.demo": {
        "sglang_deltastore.cpu_host",
        "sglang_deltastore.server_process",
        "sglang_deltastore.observe",
        "sglang_deltastore.tiers",
    },
    "sglang_deltastore.eviction": set(),
    "sglang_deltastore.lab": {
        "deltastore_kernels",
        *(
            f"sglang_deltastore.{name}"
            for name in ("calibration", "cpu_host", "eviction", "pool", "provenance", "tiers", "writes")
        ),
    },
    "sglang_deltastore.fleet": {"deltastore_kernels", "sglang_deltastore.tiers"},
    "sglang_deltastore.cli": {"sglang_deltastore"},
    "sglang_deltastore.seam": {
        "deltastore_kernels",
        *(f"sglang_deltastore.{name}" for name in ("attention", "calibration", "config", "cpu_host", "pool")),
        *(f"sglang_deltastore.{name}" for name in ("kernel_choice", "layer_rules", "observe", "options")),
        *(f"sglang_deltastore.{name}" for name in ("refusals", "request_rules", "tiers")),
    },
    "sglang_deltastore": set(),
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


def layer_of(module: str) -> str:
    """The longest key of LAYERS that is `module` or a parent of it."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in LAYERS and (length > 1 or len(parts) == 1 or name != parts[0]):
            return name
    return parts[0]


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
    layer = layer_of(module)
    wrong = []
    for name in imports_of(module, source, is_package):
        root = name.split(".")[0]
        if root == "sglang" and layer not in MAY_IMPORT_SGLANG:
            wrong.append(f"{module} imports {name}: only the seam may")
        if root in ("tests", "benchmarks", "patches"):
            wrong.append(f"{module} imports {name}")
        if root in ("sglang_deltastore", "deltastore_kernels"):
            target = layer_of(name)
            if target not in (layer, "sglang_deltastore") and target not in LAYERS[layer]:
                wrong.append(f"{module} imports {name}: {layer} may import {sorted(LAYERS[layer])}")
    return wrong


@pytest.mark.parametrize(("module", "path"), product_files(), ids=lambda value: str(value).split("/")[-1])
def test_imports_point_one_way(module: str, path: Path) -> None:
    assert violations(module, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("deltastore_kernels.layout", "from sglang_deltastore import pool"),
        ("sglang_deltastore.pool", "import sglang"),
        ("sglang_deltastore.pool", "from .seam import targets"),
        *(
            (f"sglang_deltastore.{name}", "from .observe import guard")
            for name in ("attention", "pool", "sinks", "writes")
        ),
        *(("sglang_deltastore.observe.stats", f"from .. import {name}") for name in ("pool", "seam")),
        ("sglang_deltastore.observe.nodes", "def later():\n    import sglang"),
        ("sglang_deltastore.attention", "def later():\n    from sglang.srt import utils"),
        ("sglang_deltastore.demo.command", "from tests import budgets"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert violations(module, source, is_package=False)


def test_importing_the_package_loads_neither_torch_nor_sglang() -> None:
    code = (
        "import sys, sglang_deltastore, sglang_deltastore.cli; sys.exit(bool({'torch', 'sglang'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
