"""recognize attention: every scaled_dot_product_attention becomes one `treespec::attention` with unrepeated K/V."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from treespec_compiler.errors import Refusal, Unsupported
from treespec_compiler.ir import ops  # noqa: F401  (defines them)
from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name
from treespec_compiler.ir.scores import SOFTMAX

from .attention.choices import ChoiceReader
from .attention.extra_keys import spell_extra_keys
from .attention.key_bias import BIASED, Splitter, with_key_bias, with_row_shift
from .attention.padding import PADDED, bias_of
from .attention.plain_layout import plain_layouts
from .attention.pointwise import PointwiseReader, PointwiseSite, candidates, pointwise_site, scaled_output
from .attention.relative import RelativeTerm
from .attention.shared_heads import with_equal_heads
from .attention.spelled_out import SOFTMAXES, EagerSite, Reader, Scores
from .attention.written_out import write_out
from .forms.closed_form import ClosedForms, broadcast, shape_of
from .forms.evaluate import evaluate_for_length
from .forms.masks import hides_all
from .framework.manager import Pass
from .framework.state import GraphState, refuse
from .locality.mixers import no_attention

aten = torch.ops.aten


def recognize_attention(state: GraphState) -> int:
    matches = 0
    spell_extra_keys(state)
    forms = state.closed_forms()
    for node in list(state.graph.nodes):
        if op_name(node) == "aten.scaled_dot_product_attention" and not node.users:
            state.graph.erase_node(node)  # NOTE dead-code elimination keeps what may draw random numbers
        elif op_name(node) == "aten.scaled_dot_product_attention" and not write_out(state, node):
            _rewrite(state, forms, node)
            matches += 1
    matches += recognize_eager(state) + recognize_pointwise(state)
    if not matches and not state.states:
        raise no_attention(state)
    return matches


def _rewrite(state: GraphState, forms: ClosedForms, node: fx.Node) -> None:
    dropout = argument(node, "dropout_p")
    if dropout:
        raise refuse(Refusal.TRAINING, f"attention dropout is active (p = {dropout})", node, "call model.eval() first")
    q, k, v = (argument(node, name) for name in ("query", "key", "value"))
    scale = argument(node, "scale")
    if scale is None:
        scale = 1.0 / math.sqrt(int(shape_of(q)[-1]))
    if not isinstance(scale, (int, float)):
        raise refuse(Refusal.ATTENTION, f"the attention scale is computed in the graph: {scale}", node)
    mask: Any = argument(node, "attn_mask")
    choice = ChoiceReader(state, forms, node).read(mask) if mask in forms.tainted else None
    if choice is not None:
        more = choice.index
        site = make_site(
            state, node, q, k, v, (choice.mask, bool(argument(node, "is_causal")), float(scale)), index=more
        )
        node.replace_all_uses_with(site)
        state.graph.erase_node(node)
        return
    splitter = Splitter(state, forms, node, _repeated)
    split = splitter.seen if isinstance(mask, fx.Node) and mask.meta["val"].dtype is torch.bool else splitter.split
    found = split(mask) if isinstance(mask, fx.Node) else None
    mask, bias, keys = (mask, None, None) if found is None else (found.mask, found.bias, found.padding)
    rest = (mask, bool(argument(node, "is_causal")), float(scale))
    site = make_site(state, node, q, k, v, rest, bias, padding=keys)
    node.replace_all_uses_with(site)
    state.graph.erase_node(node)


def make_site(
    state: GraphState,
    at: fx.Node,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    rest: tuple[Any, ...],
    key_bias: fx.Node | None = None,
    shift: fx.Node | None = None,
    padding: fx.Node | None = None,
    relative: RelativeTerm | None = None,
    activation: str = SOFTMAX,
    index: dict[str, Any] | None = None,
) -> fx.Node:
    """Insert `treespec::attention(q, k, v, *rest)` before `at`, with K/V heads unrepeated; rest[2] is the scale."""
    _check_axes(state, at, q, k, v)
    _check_types(state, at, q, k, v)
    k, v = _unrepeat(k, v)
    if all(shape_of(x)[1].is_Integer for x in (q, k, v)):
        q, k, v = with_equal_heads(state, at, q, k, v)
    biased = key_bias is not None
    if padding is not None:
        low = bias_of(state, at, padding, k.meta["val"].dtype)
        key_bias = low if key_bias is None else state.call(aten.add.Tensor, (key_bias, low), like=at)
    if key_bias is not None:
        q, k = with_key_bias(state, at, q, k, key_bias, rest[2])
    if shift is not None:
        q, k = with_row_shift(state, at, q, k, shift, rest[2])
    heads, kv_heads = shape_of(q)[1], shape_of(k)[1]
    if shape_of(v)[1] != kv_heads or not heads.is_Integer or heads % kv_heads != 0:
        raise refuse(
            Refusal.ATTENTION, f"got {heads} query heads, {kv_heads} key heads and {shape_of(v)[1]} value heads", at
        )
    more: dict[str, Any] = {} if relative is None else {"relative": relative.queries, "pairs": relative.pairs}
    more |= {} if activation == SOFTMAX else {"activation": activation}
    more |= index or {}
    site = state.call(torch.ops.treespec.attention.default, (q, k, v, *rest), more, like=at)
    site.meta[BIASED], site.meta[PADDED] = biased, padding is not None
    return site


def recognize_eager(state: GraphState) -> int:
    """Attention spelled as matmul, softmax, matmul."""
    plain_layouts(state)
    state.rewritten()
    forms = state.closed_forms()
    matches = 0
    for node in list(state.graph.nodes):
        if op_name(node) not in SOFTMAXES or node not in forms.tainted:
            continue
        reader = Reader(state, forms, _repeated)
        found = reader.site(node)
        if found is None and reader.rounded is not None:
            raise _rounding(reader.rounded)
        if found is None or not _attends_over_tokens(state, found):
            continue
        scores, output = found.scores, found.output
        _check_replaced(state, output, scores)
        q, k, v = _operands(state, output, scores, found.values)
        rest: tuple[Any, ...] = (scores.mask, False, scores.scale)
        if scores.softcap or scores.sinks is not None:
            rest += (scores.softcap, _sink_vector(state, output, scores.sinks))
        shift = scores.shift if scores.sinks is not None else None  # a softmax without sinks does not see it
        site = make_site(state, output, q, k, v, rest, scores.key_bias, shift, scores.padding, scores.relative)
        if len(shape_of(output)) == 3:
            site = state.call(aten.squeeze.dim, (site, 0), like=output)
        output.replace_all_uses_with(site)
        state.graph.erase_node(output)
        matches += 1
    return matches


def recognize_pointwise(state: GraphState) -> int:
    """Attention without a softmax: each weight is made of its own score alone."""
    matches = 0
    for node in candidates(state):
        reader = PointwiseReader(state, state.closed_forms(), _repeated)
        found = pointwise_site(state, node, reader)
        if found is None and reader.rounded is not None:
            raise _rounding(reader.rounded)
        if found is not None:
            _write_pointwise(state, node, found)
            matches += 1
    return matches


def _write_pointwise(state: GraphState, output: fx.Node, found: PointwiseSite) -> None:
    scores = found.scores
    _check_replaced(state, output, scores)
    q, k, v = _operands(state, output, scores, found.values)
    rest: tuple[Any, ...] = (scores.mask, False, scores.scale) + ((scores.softcap,) if scores.softcap else ())
    extra = (scores.key_bias, scores.shift, scores.padding, scores.relative, found.activation)
    site = make_site(state, output, q, k, v, rest, *extra)
    if len(shape_of(output)) == 3:
        site = state.call(aten.squeeze.dim, (site, 0), like=output)
    result = scaled_output(state, output, site, found)
    output.replace_all_uses_with(result)
    state.graph.erase_node(output)


def _operands(state: GraphState, at: fx.Node, scores: Scores, values: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """q, k, v [1, H, T, D]."""
    q, v = _four_dimensional(state, at, scores.q), _four_dimensional(state, at, values)
    return q, _four_dimensional(state, at, _untransposed(state, at, scores.k_transposed)), v


def _rounding(node: fx.Node) -> Unsupported:
    return refuse(
        Refusal.ROUNDING,
        f"attention scores or weights are rounded to {node.meta['val'].dtype}, while the queries are in another type: "
        "fused attention would not round there",
        node,
        "compute attention in one type: convert q, k and v, or leave the weights as they are",
    )


def _check_types(state: GraphState, at: fx.Node, *operands: fx.Node) -> None:
    """Attention in one type, and not in a coarser one than any weight: its roundings are then the kernel's, not ours.

    A model in bfloat16 is compared as one; a float32 model that rounds on the way to attention is not.
    """
    types = {n.meta["val"].dtype for n in operands}
    if len(types) > 1:
        what = f"attention over queries, keys and values of different types: {', '.join(sorted(map(str, types)))}"
        raise refuse(Refusal.ROUNDING, what, at)
    dtype = types.pop()
    weights = [t.dtype for t in state.constants.values() if t.dtype.is_floating_point]
    if weights and all(torch.finfo(dtype).eps > torch.finfo(w).eps for w in weights):
        raise refuse(
            Refusal.ROUNDING,
            f"attention is computed in {dtype}, which rounds, and every weight is in a finer type: the order of its "
            "sums would show in the logits",
            at,
            f"model.to({dtype}), or leave q, k and v as they are",
        )


def _check_replaced(state: GraphState, at: fx.Node, scores: Scores) -> None:
    """Scores that were replaced by an ordinary number must be hidden: what is seen must come from q k^T."""
    for where in scores.replaced:
        hiding = state.call(aten.full.default, ([], -math.inf), {"device": where.meta["val"].device}, like=at)
        mask = hiding if scores.mask is None else state.call(aten.where.self, (where, scores.mask, hiding), like=at)
        forms = state.closed_forms()
        form = forms.of(mask)
        state.proved_by(mask)
        shape = (sympy.Integer(1), shape_of(scores.q)[-3], state.length, state.length)

        def evaluate(n: int, mask: fx.Node = mask) -> Tensor:
            return evaluate_for_length(mask, state.tokens, state.constants, state.gm, n).cpu()

        if form is None or not hides_all(broadcast(form, shape), evaluate, forms.tables):
            raise refuse(
                Refusal.ATTENTION, "attention scores are replaced by another value for keys that are not hidden", where
            )


def _attends_over_tokens(state: GraphState, found: EagerSite) -> bool:
    """Whether the softmax is over a [.., T, T] matrix; any other softmax is not token attention."""
    shape = shape_of(found.scores.q), shape_of(found.scores.k_transposed)
    return all(len(s) in (3, 4) for s in shape) and shape[0][-2] == shape[1][-1] == state.length


def _untransposed(state: GraphState, at: fx.Node, node: fx.Node) -> fx.Node:
    """K [.., T, D] of K^T [.., D, T]."""
    rank = len(shape_of(node))
    if op_name(node) == "aten.transpose" and {int(d) % rank for d in node.args[1:3]} == {rank - 2, rank - 1}:
        return node.args[0]
    return state.call(aten.transpose.int, (node, -1, -2), like=at)


def _four_dimensional(state: GraphState, at: fx.Node, node: fx.Node) -> fx.Node:
    """[H, T, D] -> [1, H, T, D]."""
    return node if len(shape_of(node)) == 4 else state.call(aten.unsqueeze.default, (node, 0), like=at)


def _sink_vector(state: GraphState, at: fx.Node, sinks: fx.Node | None) -> fx.Node | None:
    """[1, H, T, 1] sinks that are the same for every query -> [H]."""
    if sinks is None:
        return None
    while op_name(sinks) in ("aten.expand", "aten._to_copy"):
        sinks = sinks.args[0]
    if any(state.length in s.free_symbols for s in shape_of(sinks)):
        raise refuse(Refusal.ATTENTION, "attention sinks differ between queries", at)
    return state.call(aten.reshape.default, (sinks, [-1]), like=at)


def _check_axes(state: GraphState, node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node) -> None:
    for name, operand in (("query", q), ("key", k), ("value", v)):
        shape = shape_of(operand)
        if len(shape) != 4 or shape[0] != 1:
            raise refuse(
                Refusal.ATTENTION,
                f"attention over a {name} of shape {_show(shape)}, expected [1, heads, tokens, dim]",
                node,
            )
        if shape[2] != state.length:
            raise refuse(
                Refusal.ATTENTION,
                f"attention over a dimension that is not the tokens: {name} has shape {_show(shape)}, "
                f"expected {state.length} (the number of tokens) in dimension 2",
                node,
            )


def _show(shape: tuple[sympy.Expr, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _unrepeat(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """K and V before `repeat_kv`, when both are repeated alike; attention shares the heads itself."""
    k_source, v_source = _repeated(k), _repeated(v)
    if k_source is None or v_source is None or shape_of(k_source)[1] != shape_of(v_source)[1]:
        return k, v
    return k_source, v_source


def _repeated(node: fx.Node) -> fx.Node | None:
    """x of `x[:, :, None].expand(1, Hkv, G, T, D).reshape(1, Hkv * G, T, D)` or of `repeat_interleave(x, G, 1)`."""
    if op_name(node) == "aten.repeat_interleave" and argument(node, "dim") in (1, -3):
        return node.args[0] if isinstance(node.args[1], int) else None
    if op_name(node) != "aten.reshape" or op_name(node.args[0]) != "aten.expand":
        return None
    expand: Any = node.args[0]
    insert: Any = expand.args[0]
    if op_name(insert) != "aten.unsqueeze":
        return None
    source: Any = insert.args[0]
    shape = shape_of(source)
    if len(shape) != 4 or insert.args[1] not in (2, -3):
        return None
    wide = shape_of(expand)
    if wide[:2] != shape[:2] or wide[3:] != shape[2:]:
        return None
    return source if shape_of(node) == (shape[0], shape[1] * wide[2], shape[2], shape[3]) else None


PASS = Pass(
    "recognize attention",
    recognize_attention,
    before="normalized graph",
    after="each attention over the tokens is one treespec::attention; K/V heads are not repeated",
    level="recognized",
    needs=("strip native cache",),
)
