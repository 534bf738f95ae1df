"""Naming what is in the way: token mixers other than attention, and masks that are chosen by content."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from treespec_compiler.errors import Refusal, Unsupported
from treespec_compiler.ir.provenance import layer_path, op_name

from ..forms.closed_form import ClosedForms, shape_of
from ..forms.evaluate import cone
from ..framework.state import GraphState, refuse
from ..token_locality import TokenAxes

_SOFTMAXES = ("aten.softmax", "aten._softmax")
# Ops that choose some of many by their values.
_CHOOSING = ("aten.topk", "aten.sort", "aten.argsort")


def no_attention(state: GraphState) -> Unsupported:
    """The refusal of a graph without any attention that is known."""
    way_out = "use torch.nn.functional.scaled_dot_product_attention (in transformers: attn_implementation='sdpa')"
    softmaxes = [n for n in state.graph.nodes if op_name(n) in _SOFTMAXES]
    over_tokens = [n for n in softmaxes if shape_of(n)[-1] == state.length]
    if not over_tokens:
        chosen = _choice_of_pairs(state) if softmaxes else None
        if chosen is not None:
            return _chosen_keys(chosen)
        try:
            TokenAxes(state)
        except Unsupported as mixer:
            return replace(mixer, reason=f"the model has no attention, and another token mixer: {mixer.reason}")
    if softmaxes:
        reason = "no attention was recognized: this softmax is not softmax(scale * q k^T + mask) v"
        return refuse(Refusal.ATTENTION, reason, (over_tokens or softmaxes)[0], way_out)
    return refuse(Refusal.NO_ATTENTION, "the model has no attention: there is no K/V cache to build a token tree on")


def content_mask(forms: ClosedForms, mask: fx.Node, site: fx.Node) -> Unsupported:
    """The refusal of a mask that is computed from the tokens; names what chooses the keys, if that is in the layer."""
    # NOTE the cone goes back to the first layer, whose router may choose experts: only this layer's choices count.
    layers = tuple(filter(None, (layer_path(site), layer_path(mask))))
    chosen: Any = None
    for node in cone(mask):
        if op_name(node) in _CHOOSING and node in forms.tainted and (layer_path(node) or "").startswith(layers):
            chosen = node
    if chosen is None:
        return refuse(
            Refusal.CONTENT,
            "the mask depends on the content of the tokens (padding, prefix-LM or a learned mask)",
            mask,
        )
    return _chosen_keys(chosen)


def _choice_of_pairs(state: GraphState) -> fx.Node | None:
    """What chooses some of a table [.., T, T] of scores: the first indexer of a model."""
    pairs = (state.length, state.length)
    choices = (n for n in state.graph.nodes if op_name(n) in _CHOOSING)
    return next((n for n in choices if shape_of(n.args[0])[-2:] == pairs), None)


def _chosen_keys(chosen: fx.Node) -> Unsupported:
    return refuse(
        Refusal.CONTENT,
        f"the mask depends on the content of the tokens: {op_name(chosen)} chooses which keys are seen (an indexer)",
        chosen,
        "write the choice as docs/hybrids.md has it: the min(n, T) best sums of weighted, rectified products, with "
        "minus infinity where a causal mask hides, scattered into a bool mask of an attention without sinks",
    )
