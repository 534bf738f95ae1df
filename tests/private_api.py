"""The names of torch's private API that a file uses, read from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

_PRIVATE = re.compile(r"torch(?:\.\w+)*?\._(?!_)\w+")


def private_names(source: str) -> set[str]:
    """`torch._dynamo`, `torch._C`, `torch._sync`: each up to its first private part."""
    found = (_PRIVATE.match(name) for name in _names(ast.parse(source)))
    return {match[0] for match in found if match}


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield _dotted(node)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
