"""Imports go one way between the rooms (docs/architecture.md), and in no circle between files.

Every import counts: in functions, under TYPE_CHECKING, and through the links `treespec_compiler/passes` and `codegen`.
"""

from __future__ import annotations

import os
from pathlib import Path

from imports import PACKAGE, Import, circles, imports, modules, rooms_of

# From the ground up: a room may import rooms of lower storeys and itself. `ir` knows no room but the
# errors and logs; passes, codegen and capture do not know each other.
STOREYS: tuple[tuple[str, ...], ...] = (
    ("errors", "logs", "versions"),
    ("ir",),
    ("user_cache",),
    ("offload_options", "checkpoints", "mesh"),
    ("options", "stages", "tree"),
    ("capture", "codegen", "passes", "offload"),
    ("converted",),
    ("pipeline",),
    ("program",),
    ("speculation",),
    ("runtime",),
    ("inspection", "backend", "demo", "serving", "training"),
    ("cli",),
    ("__main__",),
)


def upward(found: list[Import]) -> list[str]:
    """Imports of a room that is not below the importing one."""
    storey = {room: height for height, rooms in enumerate(STOREYS) for room in rooms}
    wrong = []
    for one in found:
        by, of = rooms_of(one)
        if by == PACKAGE:  # the package's own file says where its names are
            continue
        assert by in storey, f"{by} is a new room: give it a place in STOREYS and in docs/architecture.md"
        if by != of and (of == PACKAGE or storey[of] >= storey[by]):
            wrong.append(str(one))
    return wrong


def test_rooms_import_what_is_below_them() -> None:
    assert upward(imports(modules())) == []


def test_no_circle_between_files() -> None:
    assert circles(imports(modules())) == []


def package(folder: Path, files: dict[str, str]) -> Path:
    """A package of these rooms, with `passes` outside of it behind a link as in the checkout."""
    (folder / PACKAGE).mkdir()
    (folder / "passes").mkdir()
    os.symlink("../passes", folder / PACKAGE / "passes")
    for name, text in files.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_every_kind_of_import_is_read(tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "errors.py": "",
        "ir/__init__.py": "def late():\n    from ..passes import treeify\n",
        "ir/ops.py": f"import {PACKAGE}.errors, torch\n",
        "passes/treeify.py": "if TYPE_CHECKING:\n    from ..codegen.gpu import tune\n",
        "passes/__init__.py": "from . import treeify as t\n",
        "codegen/gpu.py": "",
    }
    root = package(tmp_path, files)
    assert [str(i).replace(f"{PACKAGE}.", "") for i in sorted(imports(modules(root)), key=str)] == [
        "ir.ops:1 imports errors",
        "ir:2 imports passes.treeify",
        "passes.treeify:2 imports codegen.gpu",
        "passes:1 imports passes.treeify",
    ]
    assert [line.replace(f"{PACKAGE}.", "") for line in sorted(upward(imports(modules(root))))] == [
        "ir:2 imports passes.treeify",
        "passes.treeify:2 imports codegen.gpu",
    ]


def test_a_circle_through_a_function_and_a_link_is_found(tmp_path: Path) -> None:
    files = {
        "ir/ops.py": "def late():\n    from ..passes.treeify import PASS\n",
        "passes/treeify.py": "from ..ir import ops\n",
        "passes/alone.py": "from ..ir import ops\n",
    }
    root = package(tmp_path, files)
    assert circles(imports(modules(root))) == [[f"{PACKAGE}.ir.ops", f"{PACKAGE}.passes.treeify"]]
