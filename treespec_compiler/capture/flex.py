"""flex_attention, written out.

A `score_mod` and a `mask_mod` are functions of one score and its place, so applied to all scores and to index tensors
that are broadcast they are the attention that they describe.

`mask_mod` decides what is seen. The blocks of a BlockMask only say what a kernel may skip (as torch's own reference in
eager mode, `math_attention`, ignores them), so what computes them is dropped with its `vmap`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import Refusal, Unsupported
from ..ir.provenance import layer_path, module_class, source_line

# What may stand in a score_mod or mask_mod: each acts on every element alone, whatever its operands' shapes are.
_ELEMENTWISE = (
    "abs", "add", "and", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor", "bool", "ceil", "clamp",
    "clip", "clone", "contiguous", "cos", "cosh", "detach", "div", "divide", "eq", "erf", "exp", "exp2", "expm1",
    "float", "float_power", "floor", "floor_divide", "floordiv", "fmod", "full_like", "ge", "gt", "iadd", "int",
    "invert", "isub", "le", "log", "log10", "log1p", "log2", "logaddexp", "logical_and", "logical_not",
    "logical_or", "logical_xor", "long", "lshift", "lt", "masked_fill", "maximum", "minimum", "mod", "mul",
    "multiply", "ne", "neg", "negative", "new_full", "new_ones", "new_zeros", "not_equal", "ones_like", "or",
    "pos", "pow", "reciprocal", "relu", "remainder", "round", "rshift", "rsqrt", "rsub", "sigmoid", "sign", "sin",
    "sinh", "softplus", "sqrt", "square", "sub", "subtract", "tan", "tanh", "to", "true_divide", "truediv", "type",
    "type_as", "where", "xor", "zeros_like", "scalar_tensor", "tensor", "sym_float", "sym_int",
)  # fmt: skip
_VMAP = ("_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions")
_MAPPED = ("_add_batch_dim", "_remove_batch_dim")
_FRESH = ("new_zeros", "new_ones", "new_full", "zeros", "ones", "full", "empty", "new_empty")


def spell_flex_attention(gm: fx.GraphModule) -> int:
    """Replace every flex_attention of Dynamo's graph by the products that it is; returns how many."""
    calls = [n for n in gm.graph.nodes if n.op == "call_function" and _name(n) == "flex_attention"]
    blocks: list[fx.Node] = []
    for node in calls:
        q, k, v, score_mod, block_mask, scale, _, score_buffers, mask_buffers = node.args
        blocks += [a for a in block_mask[:-1] if isinstance(a, fx.Node)]
        for function in (score_mod, block_mask[-1]):
            _check(gm, function, node)
        args = (q, k, v, score_mod, block_mask[-1], scale, tuple(score_buffers), tuple(mask_buffers))
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(attention_of, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    if calls:
        _keep_not(gm.graph, blocks)
        _drop(gm.graph, blocks)
        gm.recompile()
    return len(calls)


def attention_of(
    q: Tensor,  # [B, Hq, T, D]
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,
    score_mod: Any,
    mask_mod: Any,
    scale: float,
    score_buffers: Sequence[Tensor],
    mask_buffers: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the logarithm to base 2 of the sums of exponentials, and the largest scores (math_attention)."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    places = [
        torch.arange(size, device=q.device).view([-1 if i == d else 1 for i in range(4)])
        for d, size in enumerate((q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    ]
    scores = score_mod(q @ k.transpose(-2, -1) * scale, *places, *score_buffers)
    scores = torch.where(mask_mod(*places, *mask_buffers), scores, -torch.inf)
    sums = scores.logsumexp(-1) / math.log(2)
    return scores.softmax(-1).to(v.dtype) @ v, sums, scores.amax(-1)


def _check(gm: fx.GraphModule, function: Any, call: fx.Node) -> None:
    """Raise `Unsupported` unless the function acts on each element alone."""
    module = getattr(gm, str(function.target), None) if isinstance(function, fx.Node) else None
    if not isinstance(module, fx.GraphModule):
        raise _refusal("a score_mod or mask_mod is no function that was traced", call)
    inputs = [n for n in module.graph.nodes if n.op in ("placeholder", "get_attr")]
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if _name(node) == "getitem" and node.args[0] in inputs and not _slices(node.args[1]):
            continue  # a table read at places
        if node.op == "call_module" or _name(node) not in _ELEMENTWISE:
            raise _refusal(f"{_name(node)} in a score_mod or mask_mod is not known to act on each element alone", call)


def _slices(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(part is None or part is ... or isinstance(part, slice) for part in parts)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).strip("_") if node.op != "call_module" else "call_module"


def _refusal(what: str, node: fx.Node) -> Unsupported:
    return Unsupported(
        Refusal.MASK,
        f"flex_attention cannot be read: {what}",
        node=f"{node.name} = flex_attention",
        source=source_line(node),
        layer=layer_path(node),
        module=module_class(node),
        way_out="write it with arithmetic, comparisons, torch.where and tables that are read at b, h, q or k",
    )


def _keep_not(graph: fx.Graph, blocks: Sequence[fx.Node]) -> None:
    """Leave out of the results, behind the logits, blocks that forward sets as an attribute and that it makes of sizes.

    Setting them changes no later call unless the model does something else once they are set; a second call is compared
    (`semantics.lengths_check`), as for any table that is kept.
    """
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    results: Any = output.args[0]
    output.args = ((*results[:1], *(n for n in results[1:] if n not in blocks or not _of_sizes(n))),)


def _of_sizes(node: fx.Node) -> bool:
    """Whether a value is computed from sizes alone."""
    inputs = [n for n in _behind([node]) if n.op in ("placeholder", "get_attr")]
    values = [n.meta.get("example_value") if n.op == "placeholder" else n for n in inputs]
    return all(isinstance(v, (int, torch.SymInt)) for v in values)


def _drop(graph: fx.Graph, blocks: Sequence[fx.Node]) -> None:
    """Erase what was computed for blocks alone.

    NOTE a general dead-code elimination would drop writes that other code reads through views. Here only the blocks'
    own cone goes, with the writes into tensors that are made in it.
    """
    order = list(graph.nodes)
    unread = [n for n in order if _plain(n) in _MAPPED and not n.users]
    cone = _behind([*blocks, *unread])
    grown = True
    while grown:
        writes = [n for n in order if n not in cone and _name(n) == "setitem" and _is_fresh(n.args[0], cone)]
        cone |= _behind(writes)
        grown = bool(writes)
    kept = _behind([n for n in order if n not in cone and _plain(n) not in _VMAP] + [n for n in cone if _in_place(n)])
    gone = [n for n in cone if n not in kept and n.op not in ("placeholder", "output")]
    if not any(_plain(n) in _MAPPED for n in kept):
        gone += [n for n in order if _plain(n) in _VMAP and n not in gone]
    for node in sorted(gone, key=order.index, reverse=True):
        if not node.users:
            graph.erase_node(node)


def _behind(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes and everything that they are computed from."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _is_fresh(node: Any, cone: set[fx.Node]) -> bool:
    return isinstance(node, fx.Node) and node in cone and _name(node) in _FRESH


def _in_place(node: fx.Node) -> bool:
    return node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")


def _plain(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""
