"""Lists of places that index a tensor are seen where nothing else reads them."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from treespec_compiler.capture.listed_places import listed_places


def stand_ins(lines: str, line: int) -> list[str]:
    """What stands in at a line of a function of x, t and table."""
    source = "def f(x, t, table):\n" + "".join(f"    {text}\n" for text in lines.split("; "))
    scope: dict[str, Any] = {}
    exec(source, scope)
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.FunctionDef)
    return [ast.unparse(new) for new in (listed_places(scope["f"], body, line) or {}).values()]


@pytest.mark.parametrize(
    ("lines", "at", "stand_in"),
    [
        ("return table[range(t)]", 2, "_treespec_torch.arange(t)"),
        ("return table[:, list(range(1, t))]", 2, "_treespec_torch.arange(1, t)"),
        ("return table[[i for i in range(t)]]", 2, "_treespec_torch.arange(t)"),
        ("at = [*range(t)]; y = x + 1; return table[at]", 2, "_treespec_torch.arange(t)"),
        ("at = [*range(t)]; y = x + 1; return table[at]", 4, "_treespec_torch.arange(t)"),
    ],
)
def test_a_list_that_only_indexes_is_a_tensor(lines: str, at: int, stand_in: str) -> None:
    assert stand_ins(lines, at) == [stand_in]


@pytest.mark.parametrize(
    ("lines", "at"),
    [
        ("at = list(range(t)); at.reverse(); return table[at]", 2),
        ("at = list(range(t)); return table[at] + len(at)", 2),
        ("at = list(range(t)); at = at[1:]; return table[at]", 2),
        ("return table[[i + 1 for i in range(t)]]", 2),
        ("return table[[i for i in range(t) if i]]", 2),
        ("range = x; return table[range(t)]", 3),
        ("y = x + 1; return table[range(t)]", 2),
        ("return table[tuple(range(t))]", 2),
    ],
)
def test_others_are_left(lines: str, at: int) -> None:
    assert stand_ins(lines, at) == []
