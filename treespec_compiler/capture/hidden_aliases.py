"""Runs a graph under functionalization and refuses writes that other names of the same memory would not see.

Functionalization knows of views from the schemas of operators. Some composite ones return their argument without saying
so (`type_as` of a tensor that has the type, `sum_to_size`, `broadcast_tensors`, `einsum` of a transposition): it takes
argument and result for two tensors, and a write to one would be lost to the other. `torch.export` has the same gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import Refusal, Unsupported
from ..ir.provenance import layer_path, module_class, source_line


@dataclass
class _Pair:
    """Two functional tensors that are one memory eagerly, since the call `node`."""

    node: fx.Node
    tensors: tuple[Any, Any]
    writes: tuple[int, int]
    """How often each was written before."""


class Interpreter(fx.Interpreter):
    """An interpreter of functional tensors. Raises `Unsupported` at the end for a write that is not seen everywhere."""

    def __init__(self, module: nn.Module, graph: fx.Graph | None = None) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.pairs: list[_Pair] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op in ("call_function", "call_method"):
            given = {_memory(_plain(a)): a for node in n.all_input_nodes for a in _functional(self.env[node])}
            for value in _functional(result):
                other = given.get(_memory(_plain(value)))
                if other is not None and _memory(value.elem) != _memory(other.elem):
                    self.pairs.append(_Pair(n, (other, value), (_writes(other), _writes(value))))
        if n.op == "output":
            self._refuse_lost_writes()
        return result

    def _refuse_lost_writes(self) -> None:
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for pair in self.pairs:
            written = any(_writes(t) > before for t, before in zip(pair.tensors, pair.writes, strict=True))
            if written and all(_read_after(self.env, t, pair.node, order) for t in pair.tensors):
                raise Unsupported(
                    Refusal.STATE,
                    "its result is its argument, and one of them is changed in place while the other is still in use",
                    node=f"{pair.node.name} = {getattr(pair.node.target, '__name__', pair.node.target)}",
                    source=source_line(pair.node),
                    layer=layer_path(pair.node),
                    module=module_class(pair.node),
                    way_out="change a copy (x = x + y instead of x += y)",
                )


def _read_after(env: Mapping[fx.Node, Any], tensor: Any, call: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether anything that shares the functional memory of `tensor` is used after `call`; inputs always may be."""
    memory = _memory(tensor.elem)
    sharing = [node for node, value in env.items() if any(_memory(t.elem) == memory for t in _functional(value))]
    return any(node.op == "placeholder" or any(order[u] > order[call] for u in node.users) for node in sharing)


def _functional(value: Any) -> Iterator[Any]:
    from torch._subclasses.functional_tensor import FunctionalTensor

    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, FunctionalTensor))


def _plain(value: Any) -> Tensor:
    return torch._from_functional_tensor(value.elem)


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _writes(value: Any) -> int:
    return torch._functionalize_mutation_counter(value.elem)
