"""Where the token dimension goes in each op that acts on every token alone.

A rule gets a node with an operand that carries tokens, and returns the dimension of the result that does; it raises
`Mixes` when information moves between tokens. An op without a rule is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.library import arguments
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from .axes import Axes, Axis, Mixes, operands_of, rank_of
from .token_moves import (
    cat_rule,
    expand_rule,
    getitem_rule,
    pad_rule,
    reinterpret_rule,
    reshape_rule,
    select_rule,
    slice_rule,
    split_rule,
    squeeze_rule,
    stack_rule,
    transpose_rule,
    unbind_rule,
    unsqueeze_rule,
)


def _dims(value: Any, rank: int) -> set[int]:
    if value is None or value == []:
        return set(range(rank))
    return {int(d) % max(rank, 1) for d in (value if isinstance(value, (list, tuple)) else [value])}


def _pointwise(node: fx.Node, axes: Axes) -> Axis:
    rank = rank_of(node)
    found: set[int] = set()
    for operand, at in operands_of(node, axes):
        if at is not None:
            found.add(at + rank - rank_of(operand))
    if len(found) != 1:
        raise Mixes(f"its operands carry the tokens in different dimensions {sorted(found)}")
    at = found.pop()
    if shape_of(node)[at] != axes.length:
        raise Mixes("the token dimension is broadcast")
    return at


def _keeps_except(name: str, *, keepdim: bool = False) -> Any:
    """Ops that work along `dim`: it must not be the token dimension."""

    def rule(node: fx.Node, axes: Axes) -> Axis:
        operand: Any = node.args[0]
        at, rank = axes.axes[operand], rank_of(operand)
        if at is None or any(a is not None for o, a in operands_of(node, axes) if o is not operand):
            raise Mixes("an operand other than the first carries tokens")
        dims = _dims(argument(node, name), rank)
        if at in dims:
            raise Mixes(f"it works along dimension {at}, the tokens")
        if not keepdim or argument(node, "keepdim"):
            return at
        return at - sum(d < at for d in dims)

    return rule


def _layer_norm(node: fx.Node, axes: Axes) -> Axis:
    operand: Any = node.args[0]
    at, rank = axes.axes[operand], rank_of(operand)
    if at is None or at >= rank - len(node.args[1]):
        raise Mixes("it normalises over the tokens")
    return _only_first(node, axes)


def _only_first(node: fx.Node, axes: Axes) -> Axis:
    operand: Any = node.args[0]
    if any(a is not None for o, a in operands_of(node, axes) if o is not operand):
        raise Mixes("an operand other than the first carries tokens")
    return axes.axes[operand]


def _linear(node: fx.Node, axes: Axes) -> Axis:
    at = _only_first(node, axes)
    if at == rank_of(node.args[0]) - 1:
        raise Mixes("it contracts the token dimension")
    return at


def _matmul(node: fx.Node, axes: Axes) -> Axis:
    a, b = node.args[:2]
    at, bt = axes.axes[a], axes.axes[b]
    if rank_of(a) == 1 or rank_of(b) == 1:
        return _matmul_vector(node, axes)
    rank = rank_of(node)
    found: set[int] = set()
    if at is not None:
        if at == rank_of(a) - 1:
            raise Mixes("it contracts the token dimension")
        found.add(at + rank - rank_of(a))
    if bt is not None:
        if bt == rank_of(b) - 2 or rank_of(b) == 1:
            raise Mixes("it contracts the token dimension")
        found.add(bt + rank - rank_of(b))
    if len(found) != 1:
        raise Mixes("it combines every token of one operand with every token of the other")
    return found.pop()


def _matmul_vector(node: fx.Node, axes: Axes) -> Axis:
    """matrix @ vector drops the last dimension, vector @ matrix the one before it."""
    a, b = node.args[:2]
    matrix, vector, gone = (a, b, rank_of(a) - 1) if rank_of(b) == 1 else (b, a, rank_of(b) - 2)
    at = axes.axes[matrix]
    if axes.axes[vector] is not None or at is None or at == gone:
        raise Mixes("it contracts the token dimension")
    return at - (gone < at)


def _batch_norm(node: fx.Node, axes: Axes) -> Axis:
    if op_name(node) == "aten.batch_norm" and node.args[5]:
        raise Mixes("it normalises over the tokens (batch norm in training mode)")
    at = _only_first(node, axes)
    if at == 1:
        raise Mixes("its statistics belong to places in the sequence")
    return at


def _repeat(node: fx.Node, axes: Axes) -> Axis:
    at = axes.axes[node.args[0]]
    assert at is not None
    at += rank_of(node) - rank_of(node.args[0])
    if node.args[1][at] != 1:
        raise Mixes("it repeats the tokens")
    return at


def _repeat_interleave(node: fx.Node, axes: Axes) -> Axis:
    at, dim = axes.axes[node.args[0]], argument(node, "dim")
    if not isinstance(node.args[1], int) or dim is None or at == int(dim) % rank_of(node):
        raise Mixes("it repeats the tokens")
    return at


def _outer(node: fx.Node, axes: Axes) -> Axis:
    a, b = (axes.axes[x] for x in node.args[:2])
    if (a is None) == (b is None):
        raise Mixes("it combines every token of one operand with every token of the other")
    return 0 if a is not None else 1


def _complex(node: fx.Node, axes: Axes) -> Axis:
    at = axes.axes[node.args[0]]
    if at == max(rank_of(node.args[0]), rank_of(node)) - 1:
        raise Mixes("it pairs tokens as real and imaginary parts")
    return at


def _addmm(node: fx.Node, axes: Axes) -> Axis:
    bias, a, b = node.args[:3]
    if axes.axes[bias] is not None or axes.axes[b] is not None or axes.axes[a] != 0:
        raise Mixes("its matrices carry the tokens in an unexpected place")
    return 0


def _embedding(node: fx.Node, axes: Axes) -> Axis:
    if axes.axes[node.args[0]] is not None:
        raise Mixes("its table is computed from the tokens")
    return axes.axes[node.args[1]]


def _index_select(node: fx.Node, axes: Axes) -> Axis:
    source, index = axes.axes[node.args[0]], axes.axes[node.args[2]]
    at = int(node.args[1]) % rank_of(node.args[0])
    if source is not None and (index is not None or source == at):
        raise Mixes("it selects along the tokens")
    return source if source is not None else at


def _gather(node: fx.Node, axes: Axes) -> Axis:
    """out[.., i, ..] = source[.., index[.., i, ..], ..]: a table read by the tokens, or each token's own entries."""
    source, index = axes.axes[node.args[0]], axes.axes[node.args[2]]
    at = int(node.args[1]) % rank_of(node.args[0])
    if index is None:
        raise Mixes("it picks the same entries for every token")
    if source is None:
        # NOTE in every dimension but `at` the entry is read at the index's own place: row t of a table, for token t.
        if index != at:
            raise Mixes("it reads a table at the token's place in the sequence")
        return index
    if source != index or source == at:
        raise Mixes("it picks tokens by index")
    return source


def _index(node: fx.Node, axes: Axes) -> Axis:
    source, indices = axes.axes[node.args[0]], list(node.args[1])
    used = [i for i, x in enumerate(indices) if x is not None]
    carried = [axes.axes[indices[i]] for i in used if axes.axes[indices[i]] is not None]
    rank = max(rank_of(indices[i]) for i in used)
    if used != list(range(used[0], used[-1] + 1)):
        raise Mixes("its index tensors are not side by side")
    if source is None:
        if len(set(carried)) != 1 or any(rank_of(indices[i]) != rank for i in used):
            raise Mixes("its index tensors carry the tokens in different dimensions")
        return used[0] + int(carried[0] or 0)
    if carried or source in used:
        raise Mixes("it picks tokens by index")
    return source if source < used[0] else source - len(used) + rank


def _attention(node: fx.Node, axes: Axes) -> Axis:
    for operand in node.args[:3]:
        if axes.axes[operand] != 2:
            raise Mixes("its queries, keys or values do not carry the tokens in dimension 2")
    bias = arguments(node)["bias"]
    if bias is not None and len(bias.meta["val"].shape) == 3 and axes.axes[bias] != 0:
        raise Mixes("biases of each query do not carry the tokens in dimension 0")
    index = [arguments(node)[name] for name in ("index_q", "index_k", "index_weights")]
    if any(axes.axes[operand] != 1 for operand in index if operand is not None):
        raise Mixes("what its indexer scores does not carry the tokens in dimension 1")
    return 2


def _causal_convolution(node: fx.Node, axes: Axes) -> Axis:
    if _only_first(node, axes) != 2:
        raise Mixes("its input does not carry the tokens in dimension 2")
    return 2


def _recurrence(node: fx.Node, axes: Axes) -> Axis:
    for operand in node.all_input_nodes:
        if axes.axes[operand] != 1:
            raise Mixes("its operands do not all carry the tokens in dimension 1")
    return 1


_POINTWISE = (
    "abs", "add", "addcdiv", "addcmul", "bitwise_and", "bitwise_not", "bitwise_or", "clamp", "clamp_max",
    "clamp_min", "cos", "div", "elu", "eq", "erf", "exp", "exp2", "expm1", "floor", "floor_divide", "full_like",
    "ge", "gelu", "gt", "hardswish", "hardsigmoid", "hardtanh", "isinf", "isnan", "le", "leaky_relu", "lerp", "log",
    "log1p", "log2", "log_sigmoid", "logical_and", "logical_not", "logical_or", "lt", "masked_fill", "maximum",
    "minimum", "mish", "mul", "complex", "conj", "imag", "polar", "real", "trunc", "ceil",
    "nan_to_num", "ne", "neg", "ones_like", "pow", "reciprocal", "relu", "relu6",
    "remainder", "round", "rsqrt", "rsub", "selu", "sigmoid", "sign", "silu", "sin", "softplus", "sqrt", "square",
    "sub", "tanh", "_to_copy", "to", "true_divide", "where", "zeros_like", "__and__", "__or__", "logaddexp", "celu",
    "threshold", "type_as",
)  # fmt: skip

AxisRule = Callable[[fx.Node, Axes], Axis]

RULES: dict[str, AxisRule] = {f"aten.{name}": _pointwise for name in _POINTWISE} | {
    "treespec.causal_attention": _attention,
    "treespec.causal_convolution": _causal_convolution,
    "treespec.recurrence": _recurrence,
    "treespec.exponential_recurrence": _recurrence,
    "aten.linear": _linear,
    "aten.matmul": _matmul,
    "aten.bmm": _matmul,
    "aten.mm": _matmul,
    "aten.addmm": _addmm,
    "aten.embedding": _embedding,
    "aten.index_select": _index_select,
    "aten.gather": _gather,
    "aten.index": _index,
    "aten.layer_norm": _layer_norm,
    "aten.rms_norm": _layer_norm,
    "aten.native_layer_norm": _layer_norm,
    "aten.mean": _keeps_except("dim", keepdim=True),
    "aten.sum": _keeps_except("dim", keepdim=True),
    "aten.amax": _keeps_except("dim", keepdim=True),
    "aten.amin": _keeps_except("dim", keepdim=True),
    "aten.var": _keeps_except("dim", keepdim=True),
    "aten.std": _keeps_except("dim", keepdim=True),
    "aten.logsumexp": _keeps_except("dim", keepdim=True),
    "aten.batch_norm": _batch_norm,
    "aten._native_batch_norm_legit_no_training": _batch_norm,
    "aten.repeat": _repeat,
    "aten.repeat_interleave": _repeat_interleave,
    "aten.outer": _outer,
    "aten.view_as_complex": _complex,
    "aten.view_as_real": _complex,
    "aten.linalg_vector_norm": _keeps_except("dim", keepdim=True),
    "aten.norm": _keeps_except("dim", keepdim=True),
    "aten.softmax": _keeps_except("dim"),
    "aten.log_softmax": _keeps_except("dim"),
    "aten.cumsum": _keeps_except("dim"),
    "aten.flip": _keeps_except("dims"),
    "aten.roll": _keeps_except("dims"),
    "aten.topk": _keeps_except("dim"),
    "aten.sort": _keeps_except("dim"),
    "aten.view": reinterpret_rule,  # after normalize, `view(dtype)` is the only one left
    "aten.reshape": reshape_rule,
    "aten.flatten": reshape_rule,
    "aten.unflatten": reshape_rule,
    "aten.squeeze": squeeze_rule,
    "aten.unsqueeze": unsqueeze_rule,
    "aten.expand": expand_rule,
    "aten.transpose": transpose_rule,
    "aten.permute": transpose_rule,
    "aten.t": transpose_rule,
    "aten.slice": slice_rule,
    "aten.select": select_rule,
    "aten.cat": cat_rule,
    "aten.stack": stack_rule,
    "aten.split": split_rule,
    "aten.split_with_sizes": split_rule,
    "aten.chunk": split_rule,
    "aten.unbind": unbind_rule,
    "aten.constant_pad_nd": pad_rule,
    "aten.pad": pad_rule,
    "getitem": getitem_rule,
}
