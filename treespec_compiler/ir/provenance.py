"""Where a node came from: the user's source line and module path."""

from __future__ import annotations

import re

from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)\n\s*(?P<code>[^\n]*)')
_LIBRARIES = re.compile(r"/(torch|einops|einx)/|/treespec_compiler/capture/")
_NUMBERED = re.compile(r"^(?P<group>.*?\.(?P<index>\d+))(?:\.|$)")
_ATTRIBUTE = re.compile(r"\.(\w+)|\['(\w+)'\]|\[(\d+)\]")


def source_line(node: fx.Node) -> str | None:
    """`file:line, in function: code` of the innermost frame outside torch, libraries of notations and capture."""
    frames = [m for m in _FRAME.finditer(node.meta.get("stack_trace") or "") if not _LIBRARIES.search(m["file"])]
    if not frames:
        return None
    frame = frames[-1]
    return f"{frame['file']}:{frame['line']}, in {frame['name']}: {frame['code'].strip()}"


def layer_path(node: fx.Node) -> str | None:
    """Module path such as `model.layers.0.self_attn`, or None for code outside any submodule."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return None
    path = list(stack.values())[-1][0]
    path = re.sub(r"^L\['[^']+'\]|^L__self__", "", str(path)).replace("_modules", "")
    return ".".join(next(filter(None, groups)) for groups in _ATTRIBUTE.findall(path)) or None


def group_of(layer: str) -> tuple[str, int | None]:
    """(`model.layers.3`, 3) for `model.layers.3.self_attn`."""
    found = _NUMBERED.match(layer)
    return (found["group"], int(found["index"])) if found else ("", None)


def module_class(node: fx.Node) -> str | None:
    """Class of the innermost submodule that is not one of torch's own, such as `LlamaAttention`."""
    names = [
        cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
        for _, cls in (node.meta.get("nn_module_stack") or {}).values()
    ]
    return next((name.rpartition(".")[2] for name in reversed(names) if not name.startswith("torch.nn.")), None)


def op_name(node: fx.Node) -> str:
    """`aten.roll` for a call, the plain name for anything else."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(node.target, "__name__", str(node.target))
