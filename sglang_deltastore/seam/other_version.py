"""Whether another SGLang still has what DeltaStore takes hold of, read from its wheel, which is not installed.

    python -m sglang_deltastore.seam.other_version 0.5.22

Names that are gone, signatures that changed and options that came are work; code that changed is to be read.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from . import targets

ROOT = Path(__file__).resolve().parents[1]
STATES = GONE, SIGNATURE, CODE, SAME = "gone", "other signature", "other code", "same"
"""What became of a symbol; of these the first two are work for sure."""
_OPTIONS = "sglang/srt/arg_groups/fields/"

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Finding(NamedTuple):
    symbol: str
    state: str
    names: str
    """Parameters and fields that came (+) and went (-)."""
    used_by: str
    """Our modules, by file name."""


class Sources:
    """SGLang's modules as syntax trees; nothing of them is imported. paths: of the files, from where `sglang` lies."""

    def __init__(self, paths: Iterable[str], read: Callable[[str], bytes]) -> None:
        self.paths, self.read = set(paths), read
        self._trees: dict[str, ast.Module] = {}

    def module(self, name: str) -> ast.Module | None:
        path = self._path(name)
        if path and path not in self._trees:
            self._trees[path] = ast.parse(self.read(path))
        return self._trees.get(path)

    def package_of(self, module: str) -> str:
        """What its relative imports start from."""
        return module if self._path(module).endswith("/__init__.py") else module.rpartition(".")[0]

    def _path(self, module: str) -> str:
        base = module.replace(".", "/")
        return next((path for path in (f"{base}.py", f"{base}/__init__.py") if path in self.paths), "")


def installed() -> Sources:
    spec = find_spec("sglang")
    assert spec and spec.submodule_search_locations, "sglang is a dependency"
    root = Path(spec.submodule_search_locations[0]).parent
    paths = (path.relative_to(root).as_posix() for path in (root / "sglang").rglob("*.py"))
    return Sources(paths, lambda path: (root / path).read_bytes())


def leaned_on(before: Sources) -> dict[str, set[str]]:
    """Dotted names of SGLang that our code imports, hooks or overrides, and the names of our files that do."""
    hooks = {
        *targets.LAUNCHER_HOOKS,
        *targets.SCHEDULER_HOOKS,
        *targets.REQUEST_HOOKS,
        *targets.DRAFT_HOOKS,
        *targets.REPLICA_HOOKS,
    }
    found = {target: {"targets.py"} for target in hooks}
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_bytes())
        imported = dict(_imports(tree, "", keep=lambda module: module.split(".")[0] == "sglang"))
        overridden = {
            f"{imported[base.id]}.{member.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            for base in node.bases
            if isinstance(base, ast.Name) and base.id in imported
            for member in node.body
            if isinstance(member, ast.FunctionDef) and find(before, f"{imported[base.id]}.{member.name}")
        }
        for symbol in {*imported.values(), *overridden}:
            found.setdefault(symbol, set()).add(path.name)
    return found


def _imports(tree: ast.AST, package: str, keep: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, str]]:
    """(name here, dotted name there) of what is imported from modules, anywhere in a file of `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            if keep(module):
                yield from ((alias.asname or alias.name, f"{module}.{alias.name}") for alias in node.names)


def find(sources: Sources, symbol: str) -> ast.AST | None:
    """A dotted name's definition, through what modules import of each other and classes inherit; a module's own tree
    where it is a module. None: there is none."""
    parts = symbol.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        if (tree := sources.module(module)) is not None:
            return _member(sources, module, tree, parts[count:])
    return None


def _member(sources: Sources, module: str, scope: ast.AST, names: list[str]) -> ast.AST | None:
    """What `names` lead to, one in the other, from `scope` of a module."""
    if not names:
        return scope
    for node in _statements(getattr(scope, "body", [])):
        if _defines(node, names[0]):
            return _member(sources, module, node, names[1:])
    if isinstance(scope, ast.Module):
        imported = list(_imports(scope, sources.package_of(module)))
        places = [there for here, there in imported if here == names[0]]
        places += [f"{there.removesuffix('*')}{names[0]}" for here, there in imported if here == "*"]
        elsewhere = (".".join([there, *names[1:]]) for there in places if there != f"{module}.{names[0]}")
        return next((found for symbol in elsewhere if (found := find(sources, symbol)) is not None), None)
    if isinstance(scope, ast.ClassDef):
        bases = (
            find(sources, f"{module}.{base.id}.{'.'.join(names)}") for base in scope.bases if isinstance(base, ast.Name)
        )
        return next((found for found in bases if found is not None), None)
    return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """A scope's, those under its conditions too."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, inner, []))


def _defines(node: ast.stmt, name: str) -> bool:
    if isinstance(node, _Definition):
        return node.name == name
    places = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(place, ast.Name) and place.id == name for place in places)


def compare(before: Sources, after: Sources, symbols: dict[str, set[str]]) -> list[Finding]:
    """What became of each symbol that `before` has; what it does not have is nobody's to miss."""
    found = []
    for symbol, users in sorted(symbols.items()):
        old, new = find(before, symbol), find(after, symbol)
        if old is not None:
            found.append(Finding(symbol, _state(old, new), _changed_names(old, new), ", ".join(sorted(users))))
    return found


def _state(old: ast.AST, new: ast.AST | None) -> str:
    if new is None:
        return GONE
    if _signature(old) != _signature(new):
        return SIGNATURE
    return SAME if isinstance(old, ast.Module) or _code(old) == _code(new) else CODE


def _signature(node: ast.AST) -> list[str]:
    """What a caller must know, a word each: a function's parameters, a class's fields and those of its __init__."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [type(node).__name__, *(ast.unparse(each) for each in ast.walk(node.args) if isinstance(each, ast.arg))]
    if isinstance(node, ast.ClassDef):
        fields = [ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)]
        return fields + [word for each in node.body if _defines(each, "__init__") for word in _signature(each)]
    return [type(node).__name__]


def _changed_names(old: ast.AST, new: ast.AST | None) -> str:
    before, after = _signature(old), _signature(new) if new else []
    gone, came = ([x for x in one if x not in other] for one, other in ((before, after), (after, before)))
    return "\n".join([*(f"- {x}" for x in gone), *(f"+ {x}" for x in came)]) if new else ""


def _code(node: ast.AST) -> str:
    """Without comments, docstrings and lines' places."""
    for each in ast.walk(node):
        if isinstance(each, _Definition) and ast.get_docstring(each):
            each.body = each.body[1:]
    return ast.dump(node)


def options(sources: Sources) -> set[str]:
    """Fields of ServerArgs, which SGLang puts together from these files' classes."""
    names = (path.removesuffix(".py").replace("/", ".") for path in sources.paths if path.startswith(_OPTIONS))
    fields = {
        each.target.id
        for name in names
        for scope in getattr(sources.module(name), "body", [])
        if isinstance(scope, ast.ClassDef)
        for each in scope.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    if not fields:
        raise SystemExit(f"no options of SGLang in {_OPTIONS}; they have moved: find them, and mend this check")
    return fields


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_deltastore.seam.other_version", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("versions", nargs="+", metavar="version", help="of SGLang on PyPI, or a wheel's path")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found, a version a line")
    arguments = parser.parse_args()
    found = [_look(number) for number in arguments.versions]
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(difference.row()) + "\n" for difference in found))
    for difference in found:
        _print(difference)
    return 1 if any(difference.is_work for difference in found) else 0


class Difference(NamedTuple):
    """What another version has made of SGLang."""

    number: str
    findings: list[Finding]
    options_added: list[str]
    options_dropped: list[str]

    @property
    def is_work(self) -> bool:
        return bool(self.options_added) or any(finding.state in (GONE, SIGNATURE) for finding in self.findings)

    def row(self) -> dict[str, Any]:
        """Symbols by what became of them; of those that are the same, how many."""
        by_state = {state: [each.symbol for each in self.findings if each.state == state] for state in STATES}
        return {
            "version": self.number,
            "against": version("sglang"),
            **by_state,
            SAME: len(by_state[SAME]),
            "options added": self.options_added,
            "options dropped": self.options_dropped,
        }


def _look(number: str) -> Difference:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(number)
        with zipfile.ZipFile(path if path.suffix == ".whl" else _fetched(number, Path(folder))) as wheel:
            ours, theirs = installed(), Sources(wheel.namelist(), wheel.read)
            findings = compare(ours, theirs, leaned_on(ours))
            added, dropped = options(theirs) - options(ours), options(ours) - options(theirs)
    return Difference(number, findings, sorted(added), sorted(dropped))


def _fetched(number: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"sglang=={number}", "-d", str(folder)]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"sglang=={number} cannot be downloaded; give a version that PyPI has, or a wheel's path")
    return next(folder.glob("*.whl"))


def _print(found: Difference) -> None:
    table = Table(
        "symbol", "what became of it", "names", "used by", title=f"sglang {found.number} against {version('sglang')}"
    )
    for finding in sorted(found.findings, key=lambda finding: STATES.index(finding.state)):
        if finding.state != SAME:
            table.add_row(*finding)
    console = Console()
    console.print(table)
    same = sum(finding.state == SAME for finding in found.findings)
    console.print(f"{same} of {len(found.findings)} symbols are the same")
    for title, names in (
        ("options that are new", found.options_added),
        ("options that are gone", found.options_dropped),
    ):
        console.print(f"{title}: {', '.join(names) or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
