"""The imports of the package, read from its sources: which module imports which, lazily or for types included."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "treespec_compiler"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Import:
    """One module importing another of the package, in a line of its file."""

    by: str
    of: str
    line: int

    def __str__(self) -> str:
        return f"{self.by}:{self.line} imports {self.of}"


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its dotted name, through the links `passes` and `codegen` too."""
    found = {}
    for folder, _, files in os.walk(root / PACKAGE, followlinks=True):
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(files: Mapping[str, Path]) -> list[Import]:
    """Every import of one module of `files` by another: at its top, inside functions, under TYPE_CHECKING."""
    return [one for name, path in files.items() for one in _of_file(name, path, files)]


def _of_file(name: str, path: Path, files: Mapping[str, Path]) -> Iterator[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, package)
            # `from .rope import rotation` is of the module rotation, where there is one
            found = [m if (m := f"{base}.{alias.name}") in files else base for alias in node.names]
        else:
            continue
        for of in dict.fromkeys(found):
            if of in files and of != name:
                yield Import(name, of, node.lineno)


def _base(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def circles(found: list[Import]) -> list[list[str]]:
    """Groups of modules that import each other in a circle: strongly connected components of more than one."""
    import networkx

    graph = networkx.DiGraph((i.by, i.of) for i in found)
    return sorted(sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1)


def rooms_of(one: Import) -> tuple[str, str]:
    """The rooms of both modules: a folder or a file of the package; the package itself for its `__init__`."""
    by, of = ([*name.split("."), PACKAGE][1] for name in (one.by, one.of))
    return by, of
