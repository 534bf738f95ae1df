"""docs/architecture.md names what is there, and every document's paths exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from imports import PACKAGE, ROOT, modules

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
TOPS = (PACKAGE, "benchmarks", "codegen", "docs", "examples", "passes", "tests")

ROWS = re.findall(r"^\| (.+?) \| `([^`]+)` \| (?:`([^`]+)`)? ?\|$", ARCHITECTURE, flags=re.MULTILINE)


def defined(path: Path) -> set[str]:
    """Names that a module defines at its top."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


@pytest.mark.parametrize(("question", "path", "name"), ROWS, ids=[row[2] or row[1] for row in ROWS])
def test_where_is(question: str, path: str, name: str) -> None:
    assert (ROOT / path).is_file(), f"{question}: {path} is not there"
    assert not name or name in defined(ROOT / path), f"{question}: {path} defines no {name}"


def test_every_row_of_the_table_is_read() -> None:
    rows = [line for line in ARCHITECTURE.splitlines() if line.startswith("| ") and not line.startswith("| question")]
    assert len(ROWS) == len(rows) >= 10


def test_every_room_is_in_the_picture() -> None:
    picture = ARCHITECTURE.partition("A room imports")[0]
    rooms = {name.split(".")[1] for name in modules() if name.count(".")}
    missing = {
        room for room in rooms - {"__main__", "backend"} if f"{room}/" not in picture and f"{room}.py" not in picture
    }
    assert missing == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_documents_exist(document: Path) -> None:
    paths = re.findall(rf"[`(\s]((?:{'|'.join(TOPS)})/[\w./*-]*\w)", document.read_text(encoding="utf-8"))
    assert [path for path in paths if not any(ROOT.glob(path))] == []


def test_modules_in_documents_can_be_imported() -> None:
    known = {*modules(), *(f"{name}.{x}" for name, path in modules().items() for x in defined(path))}
    for document in DOCUMENTS:
        named = re.findall(rf"\b{PACKAGE}(?:\.\w+)+", document.read_text(encoding="utf-8"))
        assert [name for name in named if name not in known] == [], document.name
