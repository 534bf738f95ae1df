"""One word has one meaning: no public class, or type with a name, is defined in two files of the package."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def defined(tree: ast.Module) -> Iterator[str]:
    """Classes and aliases of types at the top of a module: `Name = ...` where Name is written as a class is."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and _is_class_name(target.id):
                    yield target.id


def _is_class_name(name: str) -> bool:
    return name[0].isupper() and len(name) > 1 and not name.isupper() and "_" not in name


def files() -> set[Path]:
    """Of the package, `passes` and `codegen` included, each once whatever links lead to it."""
    return {p.resolve() for top in ("treespec_compiler", "passes", "codegen") for p in (ROOT / top).rglob("*.py")}


def test_what_counts_as_a_type() -> None:
    text = "class A: pass\nclass _B: pass\nC = int\nDee = dict[str, int]\nEee: TypeAlias = int\nf = A()\nGG = 1\n"
    assert list(defined(ast.parse(text))) == ["A", "_B", "Dee", "Eee"]


def test_no_type_is_defined_twice() -> None:
    places = defaultdict(set)
    for path in files():
        for name in defined(ast.parse(path.read_text(encoding="utf-8"))):
            if not name.startswith("_"):
                places[name].add(str(path.relative_to(ROOT)))
    twice = {name: sorted(found) for name, found in places.items() if len(found) > 1}
    assert twice == {}
