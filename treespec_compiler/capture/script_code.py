"""TorchScript written as Python: the graph that a scripted or traced module runs, one line a node.

Dynamo reads Python, and TorchScript runs in an interpreter of its own. What is written here is that interpreter's
program, methods and submodules inlined: ops are called by the overload that the graph names, numbers are Python's,
attributes that are no tensors are the constants that they are now. A node without a line here ends the attempt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# The numbers that TorchScript has for them (c10/core/ScalarType.h, MemoryFormat.h).
_DTYPES = {
    0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64",
    8: "complex32", 9: "complex64", 10: "complex128", 11: "bool", 15: "bfloat16",
}  # fmt: skip
_FORMATS = {0: "contiguous_format", 1: "preserve_format", 2: "channels_last"}
_MOST_ELEMENTS = 64  # of a constant tensor that is written out


class NotWritten(Exception):
    """A node that has no line in Python here."""


class Attributes:
    """What the code reads of a module: tensors under names of its own, and everything else by its value."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.read: list[tuple[Any, ...]] = []
        """(path of the module, attribute, tensor or value), in the order of reading."""

    def tensor(self, value: Tensor) -> str:
        for name, known in self.tensors.items():
            if known is value:
                return f"self.{name}"
        name = f"tensor_{len(self.tensors)}"
        self.tensors[name] = value
        return f"self.{name}"


def python_code(module: torch.jit.ScriptModule) -> tuple[str, Attributes]:
    """`def forward(self, ...)` of a scripted module, and what it reads. Raises `NotWritten`."""
    graph = getattr(module, "inlined_graph", None)
    if graph is None:
        raise NotWritten("a module without a forward of its own")
    writer = _Writer()
    inputs = list(graph.inputs())
    writer.modules[inputs[0].debugName()] = ("", module)
    names = [writer.name(value) for value in inputs[1:]]
    defaults = _defaults(module, len(names))
    given = [f"{name}={value}" if value else name for name, value in zip(names, defaults, strict=True)]
    writer.block(graph, 1)
    outputs = [writer.value(value) for value in graph.outputs()]
    writer.line(1, f"return {', '.join(outputs)}")
    return "\n".join([f"def forward({', '.join(['self', *given])}):", *writer.lines, ""]), writer.attributes


def _defaults(module: torch.jit.ScriptModule, count: int) -> list[str]:
    """Of the arguments, "" where there is none."""
    arguments: Any = module.forward.schema.arguments if hasattr(module.forward, "schema") else ()
    found = [repr(a.default_value) if a.has_default_value() else "" for a in arguments][1:]
    return found if len(found) == count else [""] * count


class _Writer:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.modules: dict[str, tuple[str, Any]] = {}
        """Values that are modules: (path, module)."""
        self.known: dict[str, str] = {}
        """Values that are an expression without a line."""
        self.names: dict[str, str] = {}
        self.numbers: set[str] = set()
        """Values that are tensors in the graph and numbers here: sizes, in a trace."""
        self.attributes = Attributes()

    def line(self, depth: int, text: str) -> None:
        self.lines.append("    " * depth + text)

    def name(self, value: Any) -> str:
        """The variable of a value."""
        return self.names.setdefault(value.debugName(), f"v{len(self.names)}")

    def value(self, value: Any) -> str:
        return self.known.get(value.debugName()) or self.names[value.debugName()]

    def values(self, node: Any) -> list[str]:
        return [self.value(value) for value in node.inputs()]

    def block(self, block: Any, depth: int) -> None:
        for node in block.nodes():
            self.node(node, depth)

    def node(self, node: Any, depth: int) -> None:
        kind = node.kind()
        if kind in _NOTHING:
            return
        writing = _NODES.get(kind)
        if writing is not None:
            writing(self, node, depth)
            return
        if len(list(node.outputs())) != 1:
            raise NotWritten(kind)  # it changes something
        self.line(depth, f"{self.name(node.output())} = {self.call(node)}")

    def call(self, node: Any) -> str:
        """The expression of an op."""
        space, name = node.kind().split("::")
        args = self.values(node)
        tensors = [v for v in node.inputs() if _holds_tensor(v.type())]
        disguised = bool(tensors) and all(v.debugName() in self.numbers for v in tensors)
        if (disguised or not tensors) and name in _OF_NUMBERS:
            if disguised:
                self.numbers.add(node.output().debugName())
            return _OF_NUMBERS[name].format(*args)
        if name in _OF_TENSORS and (len(args) == 1 or name == "size"):
            return _OF_TENSORS[name].format(args[0]) if len(args) == 1 else f"{args[0]}.size({args[1]})"
        if space != "aten" or (not tensors and not _makes_tensor(node)):
            raise NotWritten(node.kind())
        return self._overload(node, name, args)

    def _overload(self, node: Any, name: str, args: Sequence[str]) -> str:
        """`torch.ops.aten.name.overload(...)`, as the graph calls it."""
        head = node.schema().partition("(")[0]
        overload = head.partition(".")[2] or "default"
        op = getattr(getattr(torch.ops.aten, name, None), overload, None)
        if op is None:
            raise NotWritten(head)
        written = []
        for argument, value in zip(op._schema.arguments, args, strict=True):
            value = _as_torch(argument.name, value)
            written.append(f"{argument.name}={value}" if argument.kwarg_only else value)
        return f"torch.ops.aten.{name}.{overload}({', '.join(written)})"


def _holds_tensor(kind: Any) -> bool:
    """Whether a type is a tensor, or may be one."""
    if kind.kind() == "OptionalType":
        return _holds_tensor(kind.getElementType())
    return bool(kind.kind() == "TensorType")


def _makes_tensor(node: Any) -> bool:
    return all(_holds_tensor(value.type()) or value.type().kind() == "ListType" for value in node.outputs())


def _as_torch(name: str, value: str) -> str:
    """Types and memory formats are numbers in a graph."""
    table = {"dtype": _DTYPES, "memory_format": _FORMATS}.get(name)
    if table is None or not value.lstrip("-").isdigit():
        return "None" if name == "layout" and value == "0" else value
    if int(value) not in table:
        raise NotWritten(f"{name} {value}")
    return f"torch.{table[int(value)]}"


# ------------------------------------------------------------------------------- nodes that are no calls


def _constant(writer: _Writer, node: Any, depth: int) -> None:
    output = node.output()
    writer.known[output.debugName()] = _literal(output.toIValue())


def _literal(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f"float({str(value)!r})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_literal, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
    if isinstance(value, Tensor) and value.numel() <= _MOST_ELEMENTS and not value.is_complex():
        return f"torch.tensor({_literal(value.tolist())}, dtype={value.dtype}, device={str(value.device)!r})"
    raise NotWritten(type(value).__name__)


def _attribute(writer: _Writer, node: Any, depth: int) -> None:
    path, module = writer.modules[node.input().debugName()]
    key, name = node.s("name"), node.output().debugName()
    value = getattr(module, key)
    if isinstance(value, nn.Module):
        writer.modules[name] = (f"{path}.{key}", value)
        return
    writer.attributes.read.append((path, key, value))
    writer.known[name] = writer.attributes.tensor(value) if isinstance(value, Tensor) else _literal(value)


def _written(text: Callable[[list[str]], str]) -> Callable[[_Writer, Any, int], None]:
    def writing(writer: _Writer, node: Any, depth: int) -> None:
        writer.line(depth, f"{writer.name(node.output())} = {text(writer.values(node))}")

    return writing


def _unpack(writer: _Writer, node: Any, depth: int) -> None:
    names = "".join(f"{writer.name(value)}, " for value in node.outputs())
    writer.line(depth, f"{names.strip()} = {writer.value(node.input())}")


def _same(writer: _Writer, node: Any, depth: int) -> None:
    first = next(iter(node.inputs())).debugName()
    if first in writer.modules:
        writer.modules[node.output().debugName()] = writer.modules[first]
        return
    writer.known[node.output().debugName()] = writer.value(next(iter(node.inputs())))


def _number_as_tensor(writer: _Writer, node: Any, depth: int) -> None:
    _same(writer, node, depth)
    writer.numbers.add(node.output().debugName())


def _tensor_as_number(convert: str) -> Callable[[_Writer, Any, int], None]:
    def writing(writer: _Writer, node: Any, depth: int) -> None:
        value = node.input()
        if value.debugName() in writer.numbers:
            _same(writer, node, depth)
        elif _holds_tensor(value.type()):
            writer.line(depth, f"{writer.name(node.output())} = {writer.value(value)}.item()")
        else:
            writer.line(depth, f"{writer.name(node.output())} = {convert}({writer.value(value)})")

    return writing


def _append(writer: _Writer, node: Any, depth: int) -> None:
    values = writer.values(node)
    writer.line(depth, f"{values[0]}.append({values[1]})")
    writer.known[node.output().debugName()] = values[0]


def _raise(writer: _Writer, node: Any, depth: int) -> None:
    writer.line(depth, f"raise RuntimeError({writer.values(node)[0]})")


def _branch(writer: _Writer, node: Any, depth: int) -> None:
    condition = writer.value(node.input())
    names = [writer.name(value) for value in node.outputs()]
    for word, block in zip((f"if {condition}:", "else:"), node.blocks(), strict=True):
        writer.line(depth, word)
        if condition in ("True", "False") and (condition == "True") != word.startswith("if"):
            writer.line(depth + 1, "pass")  # it is never run, whatever it is
            continue
        writer.block(block, depth + 1)
        _assign(writer, names, [writer.value(value) for value in block.outputs()], depth + 1)


def _loop(writer: _Writer, node: Any, depth: int) -> None:
    """Carried values are variables; the loop ends after so many turns, or once its condition fails."""
    most, condition, *first = writer.values(node)
    names = [writer.name(value) for value in node.outputs()]
    block = next(iter(node.blocks()))
    turn, *carried = [writer.name(value) for value in block.inputs()]
    going = f"{turn}_going"
    _assign(writer, [going, *names], [condition, *first], depth)
    writer.line(depth, f"for {turn} in range({most}):")
    writer.line(depth + 1, f"if not {going}: break")
    _assign(writer, carried, names, depth + 1)
    writer.block(block, depth + 1)
    _assign(writer, [going, *names], [writer.value(value) for value in block.outputs()], depth + 1)


def _assign(writer: _Writer, names: Sequence[str], values: Sequence[str], depth: int) -> None:
    """All at once: a value may be another's name."""
    writer.line(depth, f"{', '.join(names)} = {', '.join(values)}" if names else "pass")


_NOTHING = ("aten::warn", "prim::Print", "prim::Drop")
_NODES: dict[str, Callable[[_Writer, Any, int], None]] = {
    "prim::Constant": _constant,
    "prim::GetAttr": _attribute,
    "prim::ListConstruct": _written(lambda values: f"[{', '.join(values)}]"),
    "prim::TupleConstruct": _written(lambda values: f"({''.join(v + ', ' for v in values)})"),
    "prim::TupleIndex": _written(lambda values: f"{values[0]}[{values[1]}]"),
    "prim::Uninitialized": _written(lambda values: "None"),
    "prim::ListUnpack": _unpack,
    "prim::TupleUnpack": _unpack,
    "prim::unchecked_cast": _same,
    "prim::unchecked_unwrap_optional": _same,
    "aten::_unwrap_optional": _same,
    "prim::NumToTensor": _number_as_tensor,
    "aten::Int": _tensor_as_number("int"),
    "aten::IntImplicit": _tensor_as_number("int"),
    "aten::Float": _tensor_as_number("float"),
    "aten::FloatImplicit": _tensor_as_number("float"),
    "aten::Bool": _tensor_as_number("bool"),
    "aten::ScalarImplicit": _tensor_as_number(""),
    "aten::append": _append,
    "prim::RaiseException": _raise,
    "prim::If": _branch,
    "prim::Loop": _loop,
}
_OF_NUMBERS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "floordiv": "{0} // {1}",
    "floor_divide": "{0} // {1}", "remainder": "{0} % {1}", "pow": "{0} ** {1}", "neg": "-{0}",
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}",
    "ge": "{0} >= {1}", "__and__": "{0} and {1}", "__or__": "{0} or {1}", "__not__": "not {0}",
    "__is__": "{0} is {1}", "__isnot__": "{0} is not {1}", "__contains__": "{1} in {0}", "__getitem__": "{0}[{1}]",
    "len": "len({0})", "list": "list({0})", "slice": "{0}[{1}:{2}:{3}]", "min": "min({0}, {1})",
    "max": "max({0}, {1})", "format": "{0}", "sqrt": "{0} ** 0.5", "abs": "abs({0})",
}  # fmt: skip
"""Of Python's numbers and lists, by the op's name."""
_OF_TENSORS = {
    "size": "list({0}.size())", "dim": "{0}.dim()", "len": "len({0})", "dtype": "{0}.dtype", "device": "{0}.device",
    "numel": "{0}.numel()", "is_floating_point": "{0}.is_floating_point()", "is_cuda": "{0}.is_cuda",
    "__is__": "{0}", "__not__": "not {0}",
}  # fmt: skip
"""What is asked of a tensor."""
