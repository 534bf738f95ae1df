"""A graph as JSON values and tensors, and back: names, targets, arguments, fake values, source lines, module paths."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .values import CannotLoad, CannotSave, SizeTexts, argument, argument_of, fake, fake_of, target_of, target_text


class GraphWriter:
    """Writes graphs of one program, which share long texts and tensors."""

    def __init__(self, sizes: SizeTexts, others: frozenset[str] = frozenset()) -> None:
        """`others`: as of `target_text`."""
        self.sizes, self.others = sizes, others
        self.texts: list[Any] = []
        """Stack traces and module paths; many nodes have the same."""
        self.tensors: dict[str, Tensor] = {}
        self._places: dict[Any, int] = {}

    def write(self, gm: fx.GraphModule) -> dict[str, Any]:
        """Raises CannotSave."""
        return {"nodes": [self._node(gm, node) for node in gm.graph.nodes]}

    def _node(self, gm: fx.GraphModule, node: fx.Node) -> dict[str, Any]:
        row: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op == "call_function":
            row["target"] = target_text(node.target, self.others)
        elif node.op == "get_attr":
            row |= {"target": str(node.target), "constant": self._constant(gm, str(node.target))}
        elif node.op not in ("placeholder", "output"):
            raise CannotSave(f"a node {node.op}")
        if node.args:
            row["args"] = argument(node.args)
        if node.kwargs:
            row["kwargs"] = argument(dict(node.kwargs))
        if "val" in node.meta:
            row["val"] = fake(node.meta["val"], self.sizes)
        if "site" in node.meta:
            row["site"] = node.meta["site"]
        if trace := node.meta.get("stack_trace"):
            row["trace"] = self._place(trace)
        if stack := node.meta.get("nn_module_stack"):
            row["modules"] = self._place(tuple((key, str(path), _class(cls)) for key, (path, cls) in stack.items()))
        return row

    def _place(self, text: Any) -> int:
        if text not in self._places:
            self._places[text] = len(self.texts)
            self.texts.append(text)
        return self._places[text]

    def _constant(self, gm: fx.GraphModule, name: str) -> str:
        value = getattr(gm, name, None) if "." not in name else None
        if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
            raise CannotSave(f"the attribute {name} of the graph, which is no plain tensor")
        key = next((k for k, known in self.tensors.items() if known is value), f"constant_{len(self.tensors)}")
        self.tensors[key] = value
        return key


def _class(cls: Any) -> str:
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


def plain_name(name: Any) -> str:
    """The name, which Python takes for one and nothing else."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("__"):
        raise CannotLoad(f"the name {name!r:.80}")
    return name


class GraphReader:
    """The inverse of a writer, in a fake mode whose one symbol is `length`."""

    def __init__(self, texts: list[Any], tensors: Mapping[str, Tensor], mode: Any, length: torch.SymInt) -> None:
        self.texts, self.tensors, self.mode, self.length = texts, tensors, mode, length
        self._fakes: dict[str, Any] = {}  # equal values of many nodes are one fake tensor

    def read(self, written: Mapping[str, Any]) -> fx.GraphModule:
        """Raises CannotLoad, and what a file of another shape leads to: KeyError, TypeError, ValueError, IndexError.

        NOTE fx makes Python text of a graph and runs it: nothing of a file gets into it that is no plain name.
        """
        root, graph = nn.Module(), fx.Graph()
        made: dict[str, fx.Node] = {}
        with self.mode:
            for row in written["nodes"]:
                name = plain_name(row["name"])
                if name in made:
                    raise CannotLoad(f"a second node called {name}")
                node = made[name] = _KINDS[row["op"]](self, row, graph, root, made)
                node.name = name
                node.meta |= self._meta(row)
        return fx.GraphModule(root, graph)

    def _placeholder(self, row: Any, graph: fx.Graph, root: nn.Module, made: Mapping[str, fx.Node]) -> fx.Node:
        return graph.placeholder(row["name"])

    def _attribute(self, row: Any, graph: fx.Graph, root: nn.Module, made: Mapping[str, fx.Node]) -> fx.Node:
        name = plain_name(row["target"])
        if name not in root._buffers:
            root.register_buffer(name, self.tensors[row["constant"]], persistent=False)
        return graph.create_node("get_attr", name)

    def _call(self, row: Any, graph: fx.Graph, root: nn.Module, made: Mapping[str, fx.Node]) -> fx.Node:
        args, kwargs = argument_of(row.get("args"), made) or (), argument_of(row.get("kwargs"), made) or {}
        return graph.call_function(target_of(row["target"]), args, {plain_name(k): v for k, v in kwargs.items()})

    def _output(self, row: Any, graph: fx.Graph, root: nn.Module, made: Mapping[str, fx.Node]) -> fx.Node:
        (found,) = argument_of(row["args"], made)
        return graph.output(found)

    def _meta(self, row: Mapping[str, Any]) -> dict[str, Any]:
        meta: dict[str, Any] = {}
        if "val" in row:
            key = repr(row["val"])
            if key not in self._fakes:
                self._fakes[key] = fake_of(row["val"], self.length)
            meta["val"] = self._fakes[key]
        if "site" in row:
            meta["site"] = row["site"]
        if "trace" in row:
            meta["stack_trace"] = self.texts[row["trace"]]
        if "modules" in row:
            meta["nn_module_stack"] = {key: (path, cls) for key, path, cls in self.texts[row["modules"]]}
        return meta


_KINDS: dict[str, Callable[..., fx.Node]] = {
    "placeholder": GraphReader._placeholder,
    "get_attr": GraphReader._attribute,
    "call_function": GraphReader._call,
    "output": GraphReader._output,
}
