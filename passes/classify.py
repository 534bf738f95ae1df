"""classify: each mask's closed form becomes a MaskSpec, or the model is refused with the formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir import ops
from treespec_compiler.ir.library import arguments
from treespec_compiler.ir.provenance import layer_path, source_line
from treespec_compiler.ir.scores import SOFTMAX
from treespec_compiler.ir.specs import AttentionSpec, Limit, MaskSpec
from treespec_compiler.ir.weights import Table

from .attention.key_bias import BIASED
from .attention.padding import check_padding
from .attention.score_pack import score_table
from .forms.biases import NoDistance, NotAMask
from .forms.by_value import SampledValues, by_places_alone, signature
from .forms.closed_form import BY_PLACE, ClosedForms, Form, broadcast, shape_of
from .forms.evaluate import TooLarge, evaluate_for_length
from .forms.masks import BIDIRECTIONAL, BURIED, HIDDEN, Scoring, classify
from .forms.positions import table_limits
from .forms.score_check import checked, readable, slope_distance
from .framework.manager import Pass
from .framework.state import GraphState, refuse
from .locality.mixers import content_mask

aten = torch.ops.aten


def classify_masks(state: GraphState) -> int:
    forms = state.closed_forms()
    checks: Checks = {}
    scorings: dict[Any, tuple[Scoring, fx.Node | None]] = {}
    sites = [n for n in state.graph.nodes if n.target is ops.attention]
    for node in sites:
        call = arguments(node)
        q, k, v, mask, is_causal, scale, softcap, sinks, relative, pairs, activation = [*call.values()][:11]
        whole = sinks is not None or activation != SOFTMAX  # what is constant along a row counts
        key = (mask, is_causal, shape_of(q)[1], whole, node.meta.get(BIASED))
        if key not in scorings:
            scorings[key] = _scoring(
                state, forms, node, mask, bool(is_causal), whole, checks, (sympy.Integer(1), shape_of(q)[1])
            )
        scoring, values = scorings[key]
        spec = scoring.mask
        check_padding(state, node, spec.window, spec.chunk, spec.pattern)
        if relative is not None:
            if pairs not in scorings:
                scorings[pairs] = _scoring(state, forms, node, pairs, False, False, checks, shape_of(pairs)[:2])
            bias, own_limit = _relative_bias(state, node, relative, scorings[pairs], scoring)
        changes = {
            "chunk": spec.chunk,
            "pattern": spec.pattern,
            "softcap": float(softcap),
            "slopes": values if scoring.bias == "slopes" else None,
            "bias": _bias(state, node, scoring, values),
            "sinks": sinks,
            "activation": "" if activation == SOFTMAX else activation,
        } | ({} if relative is None else {"bias": bias})
        if call["chosen"]:
            changes |= _choice(state, node, call, [scoring, _index_scoring(state, forms, node, call, checks)])
        changes = {name: value for name, value in changes.items() if value}
        site = state.call(ops.causal_attention, (q, k, v, scale, spec.window), changes, like=node)
        node.replace_all_uses_with(site)
        state.graph.erase_node(node)
        state.sites.append(_attention_spec(len(state.sites), site, scoring, softcap, sinks is not None, activation))
        if relative is not None:
            state.sites[-1] = replace(state.sites[-1], bias=" + ".join(filter(None, (state.sites[-1].bias, RELATIVE))))
            state.limits.append(own_limit)
        site.meta["site"] = state.sites[-1].index
        if spec.limit is not None:
            state.limits.append(Limit(spec.limit, f"mask or bias table at {state.sites[-1].source}"))
    state.proved_from |= forms.read
    return len(sites)


# Masks of one meaning, such as those that each layer makes for itself, are compared with their values once.
Checks = dict[Any, int | None]


def _scoring(
    state: GraphState,
    forms: ClosedForms,
    node: fx.Node,
    mask: Any,
    is_causal: bool,
    sinks: bool,
    checks: Checks,
    heads: tuple[sympy.Expr, ...],
) -> tuple[Scoring, fx.Node | None]:
    """What the mask [*heads, T, T] is, and the input that holds its slopes or biases."""
    if mask is None:
        if not is_causal:
            raise refuse(Refusal.MASK, BIDIRECTIONAL, node)
        return Scoring(MaskSpec()), None
    form = forms.of(mask) or _by_value(state, forms, mask)
    if form is None:
        raise _unknown(forms, mask, node)
    form = broadcast(form, (*heads, state.length, state.length))
    if is_causal:
        raise refuse(Refusal.MASK, "attention has both a mask and is_causal=True", node)

    def evaluate(n: int) -> Tensor:
        try:
            value = evaluate_for_length(mask, state.tokens, state.constants, state.gm, n)
        except TooLarge:
            raise NotAMask(f"the mask, or bias, of {n} tokens is too large to be compared whole") from None
        return value.expand(*value.shape[:-2], n, n).cpu()

    try:
        scoring = _classified(state, forms, mask, form, heads, evaluate, sinks)
        sampled = SampledValues(mask, state.gm, state.tokens, state.constants, _ceiling(state))
        scoring, table = _tabulated(state, scoring, sampled, math.prod(map(int, heads)))
        hides = BURIED if node.meta.get(BIASED) else HIDDEN
        scoring = _checked(checks, scoring, table, state, sampled, sinks, hides)
    except NotAMask as error:
        raise refuse(Refusal.MASK, str(error), node) from None
    return scoring, None if table is None else state.add_weight("score", table)


def _classified(
    state: GraphState,
    forms: ClosedForms,
    mask: fx.Node,
    form: Form,
    heads: tuple[sympy.Expr, ...],
    evaluate: Callable[[int], Tensor],
    sinks: bool,
) -> Scoring:
    """What a mask does by its closed form; of a bias that is none of the distance, by its values. Raises NotAMask."""
    try:
        return classify(form, state.length, evaluate, forms.tables, sinks)
    except NoDistance:
        table = None if state.length in form.expr.free_symbols else _by_value(state, forms, mask)
        if table is None:
            raise
    places = broadcast(table, (*heads, state.length, state.length))
    return classify(places, state.length, evaluate, forms.tables, sinks)


def _by_value(state: GraphState, forms: ClosedForms, mask: fx.Node) -> Form | None:
    """A mask of places alone that some op without a rule goes into, taken for a buffer of what it is in a long text.

    What is made of it is compared with its values for shorter ones: every number of tokens up to 130.
    """
    if mask in forms.tainted or not by_places_alone(mask):
        return None
    mask.meta[BY_PLACE] = True
    state.proved_by(mask)
    return forms.by_place(mask)


def _index_scoring(
    state: GraphState, forms: ClosedForms, node: fx.Node, call: dict[str, Any], checks: Checks
) -> Scoring:
    """What the indexer's own mask is."""
    heads = (sympy.Integer(1), sympy.Integer(1))
    return _scoring(state, forms, node, call["index_mask"], False, True, checks, heads)[0]


def _choice(state: GraphState, node: fx.Node, call: dict[str, Any], found: list[Scoring]) -> dict[str, Any]:
    """The indexer's arguments. Raises the refusal of one that chooses, or attends, under another mask than the plain
    causal one: it would choose among keys that nobody sees, or be undone by what is chosen.
    """
    other = next((s for s in found if replace(s.mask, limit=None) != MaskSpec() or s.bias), None)
    changed = call["softcap"] or call["sinks"] is not None or call["relative"] is not None
    if other is not None or changed or call["activation"] != SOFTMAX:
        what = (
            f"the mask {other.mask.formula}" if other is not None else "scores that are changed or weighted otherwise"
        )
        reason = f"an indexer chooses keys under {what}: its choice is proved for plain causal attention alone"
        raise refuse(Refusal.CONTENT, reason, node)
    state.limits += [Limit(s.mask.limit, "mask of an indexer") for s in found[1:] if s.mask.limit is not None]
    names = ("index_q", "index_k", "index_weights", "index_scale", "chosen", "block", "local")
    return {name: call[name] for name in names}


def _chosen(site: fx.Node) -> str:
    """Which keys an indexer chooses, in words; "": there is none."""
    call = arguments(site)
    if not call["chosen"]:
        return ""
    if call["block"] == 1:
        return f"one of the {call['chosen']} of largest index score"
    return f"in one of the {call['chosen']} blocks of {call['block']} of largest index score"


RELATIVE = "q_h . r[q - k]"


def _relative_bias(
    state: GraphState, site: fx.Node, queries: fx.Node, found: tuple[Scoring, fx.Node | None], own: Scoring
) -> tuple[fx.Node, Limit]:
    """[T, Hq, distances], each query's products with the vectors of all distances, and the context that they reach."""
    scoring, vectors = found
    mask = scoring.mask
    if scoring.bias != "distance" or vectors is None or mask.limit is None or own.bias in ("distance", "places"):
        raise refuse(Refusal.MASK, "a query's product with vectors that are none of its distance to the key", site)
    if mask.window or mask.chunk or mask.pattern:
        raise refuse(Refusal.MASK, "a query's product with vectors of some distances only", site)
    table = vectors
    if table.meta["val"].dtype != queries.meta["val"].dtype:
        table = state.call(aten._to_copy.default, (table,), {"dtype": queries.meta["val"].dtype}, like=site)
    dim, count = int(shape_of(queries)[3]), int(shape_of(table)[1])
    table = state.call(aten.reshape.default, (table, [int(shape_of(table)[0]) // dim, dim, count]), like=site)
    products = state.call(aten.matmul.default, (queries, table), like=site)
    rows = state.call(aten.transpose.int, (state.call(aten.squeeze.dim, (products, 0), like=site), 0, 1), like=site)
    return rows, Limit(mask.limit, f"vectors of distances at {source_line(site) or 'attention'}")


def _ceiling(state: GraphState) -> int | None:
    """The longest context that may matter: what was asked for, or where a position table ends."""
    limits = [limit for _, _, limit in table_limits(state)] + ([state.max_context] if state.max_context else [])
    return min(limits, default=None)


def _tabulated(state: GraphState, scoring: Scoring, sampled: SampledValues, heads: int) -> tuple[Scoring, Table | None]:
    """What tabulates the bias, and the mask with the context that the table allows."""
    if not scoring.bias:
        return scoring, None
    seen, limit = slope_distance(scoring, sampled), 2
    if scoring.bias in ("distance", "places"):
        assert scoring.mask.limit is not None
        limit = readable(sampled, scoring.mask.limit)
        seen = min(x for x in (limit, scoring.mask.window or limit, scoring.mask.chunk or limit))
        scoring = replace(scoring, mask=replace(scoring.mask, limit=limit))
    return scoring, score_table(state, sampled.node, scoring.bias, heads, limit, seen)


def _checked(
    checks: Checks,
    scoring: Scoring,
    table: Table | None,
    state: GraphState,
    sampled: SampledValues,
    sinks: bool,
    hides: float,
) -> Scoring:
    """The scoring, with the context in which the mask's own values agree with it."""
    key = (signature(sampled.node), scoring, sinks, hides)
    if key not in checks:
        values = None if table is None else table.function(state.constants)
        checks[key] = checked(scoring, values, sampled, sinks, hides)
    limit = checks[key]
    return scoring if limit is None else replace(scoring, mask=replace(scoring.mask, limit=limit))


def _unknown(forms: ClosedForms, mask: fx.Node, site: fx.Node) -> Exception:
    """Name the op that keeps the mask from having a closed form."""
    if mask in forms.tainted:
        return content_mask(forms, mask, site)
    current = mask
    while True:
        blocked = [a for a in current.all_input_nodes if forms.of(a) is None]
        if not blocked:
            return refuse(Refusal.MASK, f"the mask has no closed form: no rule for {current.target}", current)
        current = blocked[0]


_BIASES = {"": "", "slopes": "slope_h * (k - q)", "distance": "bias_h[q - k]", "places": "bias_h[q, k]"}


def _bias(state: GraphState, site: fx.Node, scoring: Scoring, values: fx.Node | None) -> fx.Node | None:
    """[heads, distances], or [T, heads, distances] where each node reads the row of its place."""
    if scoring.bias == "distance" or values is None:
        return values if scoring.bias == "distance" else None
    if scoring.bias != "places":
        return None
    length = state.call(aten.sym_size.int, (state.node(state.tokens), 1), like=site)
    return state.call(aten.slice.Tensor, (values, 0, 0, length), like=site)


def _attention_spec(
    index: int, site: fx.Node, scoring: Scoring, softcap: float, sinks: bool, activation: str
) -> AttentionSpec:
    q, k, v = (shape_of(a) for a in site.args[:3])
    layer = layer_path(site) or ""
    return AttentionSpec(
        index=index,
        name=f"{layer or 'attention'}#{index}",
        layer=layer,
        source=source_line(site) or "",
        heads=int(q[1]),
        kv_heads=int(k[1]),
        key_dim=int(k[3]),
        value_dim=int(v[3]),
        scale=float(site.args[3]),
        mask=scoring.mask,
        dtype=site.meta["val"].dtype,
        softcap=softcap,
        bias=_BIASES[scoring.bias],
        sinks=sinks,
        activation=activation,
        index_dim=int(shape_of(arguments(site)["index_k"])[2]) if arguments(site)["chosen"] else 0,
        choice=_chosen(site),
    )


PASS = Pass(
    "classify",
    classify_masks,
    before="recognized attention",
    after="each mask is a proved MaskSpec; treespec::causal_attention has no mask input",
    level="classified",
    needs=("recognize attention",),
)
