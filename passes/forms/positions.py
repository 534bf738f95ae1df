"""Where positions enter the data: the cut between index arithmetic and everything else.

A cut node is one whose value at token t is known in closed form and whose users are not. Each is either a plain
position (`i + c`, replaced by the tree's positions), a slice of a table (`table[c : c + T]`, replaced by reading the
table at the tree's positions), or the same for every token (left alone). Any other dependence on the position, and any
use of the number of tokens as a number, is refused with its formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import Tensor, fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir.provenance import op_name, source_line
from treespec_compiler.ir.specs import Limit

from ..framework.state import GraphState, refuse
from ..locality.token_rules import RULES
from .by_value import LONGEST, SampledValues, proved_up_to, same_bits, same_up_to, signature
from .closed_form import ClosedForms, Form, axis, shape_of
from .evaluate import cone


@dataclass(frozen=True)
class Cut:
    """`kind`: "position" (i + offset in dimension `at`), "table" (a slice from `offset` along `at`) or "constant"."""

    kind: str
    at: int | None
    offset: int = 0
    number: float | int | bool | None = None
    """Of a constant that is one number everywhere, although it is computed from a count of the tokens."""


# Arguments that are sizes: here the number of tokens is a shape, which the tree program reads as the number of nodes.
_SIZE_OPS = {
    "aten.reshape", "aten.expand", "aten.arange", "aten.full", "aten.ones", "aten.zeros", "aten.new_ones",
    "aten.new_zeros", "aten.new_full", "aten.slice", "aten.sym_size", "aten.unflatten", "aten.empty", "aten.new_empty",
}  # fmt: skip


_MOVES = {"aten.reshape", "aten.unsqueeze", "aten.squeeze", "aten.expand", "aten.transpose", "aten.permute"}


def position_cut(state: GraphState) -> dict[fx.Node, Cut]:
    """The cut of a classified graph; raises the refusal for positions of any other form."""
    forms = state.closed_forms()
    cut: dict[fx.Node, Cut] = {}
    for node in state.graph.nodes:
        _refuse_length_as_number(state, forms, node)
        if node.op == "output" or not any(forms.of(user) is None for user in node.users):
            continue
        if _follows(state, forms, node):
            _descend(state, forms, node, cut)
        else:
            _refuse_counted(state, forms, node)
    state.proved_from |= forms.numbers
    return cut


def _follows(state: GraphState, forms: ClosedForms, node: fx.Node) -> bool:
    """Whether the node is a tensor with a closed form that depends on the number of tokens in value or shape."""
    if not isinstance(node.meta.get("val"), Tensor):
        return False
    form = forms.of(node)
    return form is not None and (bool(_token_dims(state, form)) or state.length in form.expr.free_symbols)


def _refuse_counted(state: GraphState, forms: ClosedForms, node: fx.Node) -> None:
    """A value of fixed shape that the number of tokens goes into is no constant, unless it is the same for each."""
    value: Any = node.meta.get("val")
    counted = node.op == "call_function" and node in forms.counting and node not in forms.tainted
    if not counted or not isinstance(value, Tensor) or any(state.length in s.free_symbols for s in shape_of(node)):
        return
    sampled = _sampled(state, node)
    proved = same_up_to(sampled)
    if proved is None or proved < 2:
        raise refuse(
            Refusal.LENGTH,
            f"a value depends on the total number of tokens T = {state.length}, in {value.dtype}",
            node,
            "a tree's nodes lie on paths of different lengths, so the total has no meaning there",
        )
    limit = Limit(proved, f"arithmetic on the number of tokens is looked at up to here: {source_line(node)}")
    if proved < sampled.ceiling and limit not in state.limits:
        state.limits.append(limit)


def _sampled(state: GraphState, node: fx.Node) -> SampledValues:
    state.proved_by(node)
    return SampledValues(node, state.gm, state.tokens, state.constants, state.max_context)


def _counts(state: GraphState, node: fx.Node, at: int, offset: int | None) -> bool:
    """Whether the node's values are i + offset (None: the same for every token), bit for bit, at every length."""
    if node.op != "call_function":
        return True  # the positions that a caller gives
    if offset is not None and _only_moves(node):
        return True
    sampled, dtype = _sampled(state, node), node.meta["val"].dtype
    # Layers compute the same positions, and two passes ask for them.
    key = (
        signature(node),
        at,
        offset,
        *((n.name, state.weights[n.name]) for n in cone(node) if n.name in state.weights),
    )
    if key not in state.counted:
        state.counted[key] = _counted(sampled, dtype, node.meta["val"].dim(), at, offset)
    return state.counted[key]


def _counted(sampled: SampledValues, dtype: torch.dtype, dims: int, at: int, offset: int | None) -> bool:
    def holds(n: int) -> bool:
        places = torch.arange(n) if n == sampled.ceiling else sampled.places(n)  # rounding may spare all but a few
        values = sampled.at(n, [places if i == at else None for i in range(dims)]).movedim(at, -1)
        if offset is None:
            return same_bits(values, values[..., :1].expand(values.shape))
        return same_bits(values, (places + offset).to(dtype).expand(values.shape))

    return proved_up_to(sampled, holds) >= sampled.ceiling


def _holds_count(state: GraphState, node: fx.Node) -> bool:
    """Whether a count of the tokens goes into the node's computation."""
    counts = (n for n in (node, *cone(node)) if op_name(n) == "aten.arange")
    return any(state.length in shape_of(n)[0].free_symbols for n in counts)


def _number(state: GraphState, node: fx.Node) -> float | int | bool | None:
    """The number that a constant over the tokens is everywhere; None: several."""
    values = _sampled(state, node).at(2, [None] * node.meta["val"].dim())
    first = values.flatten()[:1]
    return first.item() if same_bits(values, first.expand(values.shape)) else None


def _only_moves(node: fx.Node) -> bool:
    """Whether the node is an arange of int64 in another shape: nothing is computed that could round."""
    while op_name(node) in ("aten.reshape", "aten.unsqueeze", "aten.expand", "aten.squeeze"):
        node = node.args[0]
    return op_name(node) == "aten.arange" and node.meta["val"].dtype is torch.int64


def _token_dims(state: GraphState, form: Form) -> list[int]:
    return [i for i, s in enumerate(form.shape) if state.length in s.free_symbols]


def _descend(state: GraphState, forms: ClosedForms, node: fx.Node, cut: dict[fx.Node, Cut]) -> None:
    if node in cut:
        return
    form = forms.of(node)
    assert form is not None
    dims = _token_dims(state, form)
    text = f"{form.expr}".replace(f"a{dims[0]}", "i") if len(dims) == 1 else str(form.expr)
    if state.length in form.expr.free_symbols:
        raise refuse(Refusal.LENGTH, f"a value depends on the total number of tokens T = {state.length}: {text}", node)
    if len(dims) > 1:
        user = next((u for u in node.users if forms.of(u) is None), node)
        raise refuse(Refusal.POSITIONS, "a table over pairs of tokens is used outside an attention mask", user)
    at = dims[0]
    sources = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor) and _follows(state, forms, a)]
    if axis(at) not in form.expr.free_symbols and _counts(state, node, at, None):
        number = _number(state, node) if _holds_count(state, node) else None
        if number is not None or not _holds_count(state, node):
            cut[node] = Cut("constant", at, number=number)
            return
        for source in sources:  # the same row of a table for every token
            _descend(state, forms, source, cut)
        return
    offset = None if form.is_bool else _offset(form.expr, axis(at))
    if offset is not None and (offset >= 0 or not sources) and _counts(state, node, at, offset):
        if offset < 0:
            raise refuse(Refusal.POSITIONS, f"positions start below zero: {text}", node)
        cut[node] = Cut("position", at, offset)
        return
    sliced = _table_slice(state, forms, node, at)
    if sliced is not None:
        cut[node] = Cut("table", at, sliced)
        return
    if not sources or not (_may_descend(form, at) or _by_token(state, forms, node, at)):
        raise refuse(
            Refusal.POSITIONS,
            f"positions are not i + constant but {text}",
            node,
            "positions must count the tokens one by one",
        )
    _refuse_length_as_number(state, None, node)
    for source in sources:
        _descend(state, forms, source, cut)


def _offset(expr: Any, symbol: sympy.Symbol) -> int | None:
    gap = sympy.expand(expr - symbol) if not isinstance(expr, sympy.logic.boolalg.BooleanAtom) else None
    return int(gap) if gap is not None and gap.is_Integer else None


def _may_descend(form: Form, at: int) -> bool:
    """A function of the position in one piece, or a read of a table at `position + constant`.

    The operands then decide, and the function itself is applied to the tree's positions.
    """
    symbol, expr = axis(at), form.expr
    if form.is_bool:
        return False
    return not any(symbol in chosen.free_symbols for chosen in _choices(expr))


def _by_token(state: GraphState, forms: ClosedForms, node: fx.Node, at: int) -> bool:
    """Whether positions are clamped, compared, wrapped or chosen between, or such numbers are computed with, token by
    token: a node's own position gives its number, as one of a text's places does (ChatGLM's clipped positions).
    """
    name = op_name(node)
    if RULES.get(name) is not RULES["aten.add"] and name not in _MOVES and not _reads(node):
        return False
    followed = [(a, forms.of(a)) for a in node.all_input_nodes if _follows(state, forms, a)]
    return all(
        form is not None
        and (_may_descend(form, _dim(form, state)) or a.op != "call_function" or _by_token(state, forms, a, at))
        for a, form in followed
    )


def _dim(form: Form, state: GraphState) -> int:
    return next(iter(_token_dims(state, form)), 0)


def _choices(expr: Any) -> Iterator[Any]:
    """What decides between values; of a case by case form the conditions, not the values."""
    yield from expr.atoms(sympy.Min, sympy.Max, sympy.Mod)
    for cases in expr.atoms(sympy.Piecewise):
        yield from (condition for _, condition in cases.args)


def _table_slice(state: GraphState, forms: ClosedForms, node: fx.Node, at: int) -> int | None:
    """The start of `slice(table, at, start, start + T)` for a table that does not depend on the number of tokens."""
    if op_name(node) != "aten.slice":
        return None
    source: Any = node.args[0]
    dim = int(node.args[1]) % len(shape_of(source))
    if dim != at or any(state.length in s.free_symbols for s in shape_of(source)):
        return None
    start, _, step = node.args[2:]
    start = 0 if start is None else start
    return start if isinstance(start, int) and start >= 0 and step == 1 else None


def _refuse_length_as_number(state: GraphState, forms: ClosedForms | None, node: fx.Node) -> None:
    """`forms`: what has a form without the number of tokens is let pass; it is asked for again where it stays in the
    graph, below the cut (None)."""
    form = None if forms is None else forms.of(node)
    if form is not None and state.length not in form.expr.free_symbols:
        return
    if node.op != "call_function" or op_name(node) in _SIZE_OPS:
        return
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return  # size arithmetic
    for operand in node.all_input_nodes:
        size = operand.meta.get("val")
        if (
            isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))
            and state.length in size.node.expr.free_symbols
        ):
            chunk = chunk_of(size.node.expr)
            cut = f", as where tokens are cut into chunks of {chunk} to be mixed without attention" if chunk else ""
            raise refuse(
                Refusal.LENGTH,
                f"the number of tokens is used as a number: {size.node.expr}{cut}",
                node,
                "a tree's nodes lie on paths of different lengths, so the total has no meaning there",
            )


def chunk_of(size: sympy.Expr) -> int | None:
    """The length of the chunks that tokens are padded to, in an expression such as Mod(64 - Mod(T, 64), 64)."""
    mods = [f for f in size.atoms(sympy.Function) if f.func.__name__.endswith("Mod")]
    return max((int(a) for f in mods for a in f.args if a.is_Integer), default=None)


def table_limits(state: GraphState) -> list[tuple[fx.Node, int | None, int]]:
    """(node, offset, limit) for every read of a table at a position, or at a number that is computed from one (offset
    None): context lengths above `limit` leave the table.
    """
    forms = state.closed_forms()
    found: list[tuple[fx.Node, int | None, int]] = []
    for node in state.graph.nodes:
        for table, dim, index in _reads(node):
            form = forms.of(index) if isinstance(index, fx.Node) else None
            dims = _token_dims(state, form) if form is not None else []
            if form is None or len(dims) != 1 or form.is_bool:
                continue
            offset = _offset(form.expr, axis(dims[0]))
            size = shape_of(table)[dim]
            if not size.is_Integer:
                continue
            if offset is not None:
                found.append((node, offset, int(size) - offset))
                continue
            grows = _may_descend(form, dims[0])
            limit = _first_outside(form.expr, axis(dims[0]), int(size)) if grows else None
            limit = limit or _leaves_table(state, index, dims[0], form, int(size), grows)
            if limit is not None:
                found.append((node, None, limit))
    return found


def _first_outside(expr: Any, symbol: sympy.Symbol, size: int) -> int | None:
    """The first position whose number, which only its position decides, is no row of a table; None: none is found."""
    if expr.free_symbols != {symbol} or expr.has(AppliedUndef):
        return None

    def inside(i: int) -> bool:
        value = expr.xreplace({symbol: sympy.Integer(i)})
        return bool(value >= 0) and bool(value < size)

    last = 1
    while last < LONGEST and inside(last):
        last *= 2
    if inside(min(last, LONGEST)):
        return None
    low, high = last // 2, last  # numbers that grow with the position: others are refused (`_may_descend`)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if inside(middle) else (low, middle)
    return low


def _leaves_table(state: GraphState, index: fx.Node, at: int, form: Form, size: int, grows: bool) -> int | None:
    """The first position whose number, read from another table or, unless it `grows` with the position, computed in
    whatever way, is no row of a table; None: none is."""
    forms = state.closed_forms()
    read = next(iter(form.tables), None)
    lengths = [] if grows else [_LOOKED_AT]
    if read is not None:
        if form.expr.free_symbols != {axis(at)}:
            return None
        tables = zip(forms.tables[str(read.func)].shape, read.args, strict=True)
        lengths = [int(s) for s, i in tables if i == axis(at)] or lengths
    if not lengths:
        return None
    length = min(lengths[0], state.max_context or lengths[0])
    numbers = SampledValues(index, forms.gm, forms.tokens, forms.constants, None).at(length, [None] * len(form.shape))
    outside = ((numbers < 0) | (numbers >= size)).movedim(at, 0).reshape(length, -1).any(1).nonzero()
    if len(outside):
        return int(outside[0])
    return None if read is not None or length < _LOOKED_AT else length


# Positions whose numbers are computed one by one; a context ends here where they do not grow with the position.
_LOOKED_AT = 1 << 18


def _reads(node: fx.Node) -> list[tuple[fx.Node, int, Any]]:
    name = op_name(node)
    args: Any = node.args
    if name == "aten.embedding":
        return [(args[0], 0, args[1])]
    if name == "aten.index_select":
        return [(args[0], int(args[1]) % len(shape_of(args[0])), args[2])]
    if name == "aten.gather":
        return [(args[0], int(args[1]) % len(shape_of(args[0])), args[2])]
    if name == "aten.index":
        return [(args[0], i, x) for i, x in enumerate(args[1]) if x is not None]
    return []
