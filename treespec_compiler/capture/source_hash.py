"""What says whether a function is one that is known: a hash of its source."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from types import FunctionType


def source_hash(function: FunctionType) -> str:
    """Of the function and of those of its file that it calls, without comments, docstrings and decorators."""
    pending, found = [function], dict[str, str]()
    while pending:
        each = pending.pop()
        if each.__qualname__ in found:
            continue
        found[each.__qualname__] = ast.unparse(syntax_of(each))
        for name in each.__code__.co_names:
            value = each.__globals__.get(name)
            inner = inspect.unwrap(value) if callable(value) else None
            if isinstance(inner, FunctionType) and inner.__module__ == function.__module__:
                pending.append(inner)
    text = "\n".join(found[name] for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def syntax_of(function: FunctionType) -> ast.FunctionDef:
    """Of a function, without its decorators and its docstring; of one without a source, a body that says so."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        tree = ast.parse(f"def {function.__name__}():\n    {function.__code__.co_code!r}").body[0]
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = []
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:] or [ast.Pass()]
    return tree
