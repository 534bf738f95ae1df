"""How a tensor that no module registers is found again: by the way Dynamo reached it when it read it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

# Dynamo's names for what the captured function reads are expressions: L['model'].scales[0],
# G['__import_package_dot_module'].TABLE, L['model'].f.__closure__[0].cell_contents.
_GLOBAL = re.compile(r"\bG\['([^']+)'\]")


def finder(
    source: str, model: nn.Module, value: Tensor, names: Mapping[str, Any]
) -> Callable[[nn.Module], Tensor | None] | None:
    """A function from the model to the tensor that is now where `value` was read, or to None where nothing is.

    `names` are the globals of the captured function. None where the source is no such expression.
    """
    scope = {name: names[name] for name in _GLOBAL.findall(source) if name in names}
    try:
        code = compile(source, "<source of a tensor>", "eval")
    except (SyntaxError, ValueError):
        return None

    def find(model: nn.Module) -> Tensor | None:
        try:
            found = eval(code, {}, {"L": {"model": model}, "G": scope})
        except (AttributeError, LookupError, NameError, TypeError):
            return None
        return found if isinstance(found, Tensor) else None

    return find if find(model) is value else None


def place(source: str, model: nn.Module) -> tuple[dict[Any, Any] | list[Any], Any] | None:
    """The list or dict of the model's that holds the tensor of a source such as `L['model'].caches[0]`, and its key."""
    try:
        tree = ast.parse(source, mode="eval").body
        key = ast.literal_eval(tree.slice) if isinstance(tree, ast.Subscript) else None
    except (SyntaxError, ValueError):
        return None
    if not isinstance(tree, ast.Subscript):
        return None
    try:
        holder = eval(compile(ast.Expression(tree.value), "<source of a tensor>", "eval"), {}, {"L": {"model": model}})
        found = holder[key]
    except (AttributeError, LookupError, NameError, TypeError):
        return None
    return (holder, key) if type(holder) in (list, dict) and isinstance(found, Tensor) else None
