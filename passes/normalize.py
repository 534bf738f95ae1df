"""normalize: one spelling per meaning.

Every aten call gets all its arguments (`ir.arguments`). Assertions, aliases and inference-time dropout go; views become
reshapes, inverted permutations argsorts, tensors that are written part by part concatenations, and experts that are run
one after the other one grouped matmul.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir.arguments import argument, fill
from treespec_compiler.ir.provenance import op_name

from .framework.manager import Pass
from .framework.state import GraphState, refuse
from .spellings.assembled import spell_assembled
from .spellings.attention_algebra import spell_constant_keys, spell_score_factor
from .spellings.attention_weights import spell_weights
from .spellings.contractions import spell_contraction, spell_one_hot
from .spellings.cut_places import spell_cut_places
from .spellings.einsum import spell_einsum
from .spellings.grouped_experts import spell_counts, spell_grouped
from .spellings.head_mixes import spell_mixed_scores, spell_mixed_weights
from .spellings.inverse_permutation import spell_inverse
from .spellings.joined_pieces import spell_joined_pieces
from .spellings.maps import write_out_maps
from .spellings.meshgrid import spell_meshgrid
from .spellings.other_names import spell_other_name
from .spellings.own_places import spell_own_places
from .spellings.picked_rows import spell_picked_rows
from .spellings.pieces import spell_only_piece, spell_whole_steps
from .spellings.score_sums import spell_score_sum
from .spellings.sizes import spell_size
from .spellings.softmax import spell_softmax
from .spellings.weight_sums import spell_weight_sum

aten = torch.ops.aten

_ASSERTIONS = {
    "aten._assert_tensor_metadata",
    "aten._assert_async",
    "aten._assert_scalar",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
}
_ALIASES = {"aten.detach", "aten.alias", "aten.lift_fresh_copy", "aten.lift_fresh", "aten.clone", "aten.contiguous"}
_DROPOUTS = {"aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.native_dropout"}
_SYNONYMS = {
    "aten.multiply": aten.mul,
    "aten.subtract": aten.sub,
    "aten.divide": aten.div,
    "aten.concat": aten.cat,
    "aten.concatenate": aten.cat,
    "aten.absolute": aten.abs,
    "aten.negative": aten.neg,
    "aten.greater": aten.gt,
    "aten.greater_equal": aten.ge,
    "aten.less": aten.lt,
    "aten.less_equal": aten.le,
    "aten.not_equal": aten.ne,
    "aten.clip": aten.clamp,
}
_OF_TWO: dict[Any, Any] = {aten.min.other: aten.minimum.default, aten.max.other: aten.maximum.default}
_SPELLINGS = (
    spell_size,
    spell_other_name,
    spell_only_piece,
    spell_whole_steps,
    spell_joined_pieces,
    spell_cut_places,
    spell_own_places,
    spell_meshgrid,
    spell_one_hot,
    spell_contraction,
    spell_picked_rows,
    spell_einsum,
    spell_score_sum,
    spell_score_factor,
    spell_softmax,
    spell_weights,
    spell_mixed_scores,
    spell_mixed_weights,
    spell_weight_sum,
    spell_constant_keys,
    spell_inverse,
    spell_assembled,
    spell_counts,
    spell_grouped,
)
_END = 2**62  # slices to the end are written with the largest int64


def normalize(state: GraphState) -> int:
    matches = write_out_maps(state)
    for node in list(state.graph.nodes):
        if node.op != "call_function":
            continue
        fill(node)
        name = op_name(node)
        if name in _ASSERTIONS:
            state.graph.erase_node(node)
        elif name in _DROPOUTS:
            _drop_dropout(state.graph, node)
        elif name == "aten.type_as" and not _is_noop(node, name):
            node.target, node.args = aten._to_copy.default, (node.args[0],)
            node.kwargs = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}
            fill(node)
        elif name in _ALIASES or _is_noop(node, name):
            node.replace_all_uses_with(node.args[0])
            state.graph.erase_node(node)
        elif name in ("aten.view", "aten._unsafe_view") and node.target is not aten.view.dtype:
            # NOTE a view is only legal for the strides of the trace; the rewritten graph has other strides.
            node.target = aten.reshape.default
        elif name in _SYNONYMS:
            node.target = getattr(_SYNONYMS[name], node.target._overloadname)
        elif node.target in _OF_TWO:
            node.target = _OF_TWO[node.target]
        elif name == "aten.squeeze":
            _name_squeezed(node)
        elif not _spell(state, node):
            _refuse_mutation(node)
            continue
        matches += 1
    return matches


def _spell(state: GraphState, node: fx.Node) -> bool:
    """Spell one node, and once more what it was spelled as: an einsum may be a product of combined weights.

    NOTE a spelling erases no node but its own: what lies between its neighbours afterwards is new.
    """
    before, after = node.prev, node.next
    if not any(spell(state, node) for spell in _SPELLINGS):
        return False
    made, current = [], before.next
    while current is not after:
        made.append(current)
        current = current.next
    for new in made:
        if new.op == "call_function":
            any(spell(state, new) for spell in _SPELLINGS)
    return True


def _name_squeezed(node: fx.Node) -> None:
    """Say which dimensions go: a tree of one node has a token dimension of size 1, which must stay."""
    source: Any = node.args[0]
    shape, rank = source.meta["val"].shape, source.meta["val"].dim()
    asked = argument(node, "dim", list(range(rank)))
    dims = [int(d) % rank for d in (asked if isinstance(asked, (list, tuple)) else [asked])]
    node.target = aten.squeeze.dims
    node.args = (source, [d for d in dims if isinstance(shape[d], int) and shape[d] == 1])


def _drop_dropout(graph: fx.Graph, node: fx.Node) -> None:
    p, train = node.args[1], node.args[2]
    if train and p != 0:
        raise refuse(
            Refusal.TRAINING,
            f"dropout is active (p = {p}): the model is in training mode",
            node,
            "call model.eval() first",
        )
    if op_name(node) == "aten.native_dropout":
        for user in list(node.users):
            if user.target is operator.getitem and user.args[1] == 0:
                user.replace_all_uses_with(node.args[0])
                graph.erase_node(user)
    else:
        node.replace_all_uses_with(node.args[0])
    # NOTE dead-code elimination would keep it: a random op counts as impure.
    if not node.users:
        graph.erase_node(node)


def _is_noop(node: fx.Node, name: str) -> bool:
    before: Any = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    after: Any = node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if name == "aten.slice":
        # As many elements as there are, one after the other, are all of them: `x[-T:]` for T rows as well as `x[:T]`.
        return node.args[4] == 1 and _same_shape(before, after)
    if name in ("aten._to_copy", "aten.to", "aten.type_as"):
        return before.dtype == after.dtype and before.device == after.device
    if name == "aten.expand":
        return _same_shape(before, after)
    return False


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dim() != b.dim():
        return False
    return all(_expr(x) == _expr(y) for x, y in zip(a.shape, b.shape, strict=True))


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _refuse_mutation(node: fx.Node) -> None:
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        raise refuse(Refusal.STATE, "the graph changes a tensor in place after functionalization", node)


PASS = Pass(
    "normalize",
    normalize,
    before="functional pre-dispatch ATen",
    after="no assertion, alias, view or inference-time dropout; nothing is changed in place",
    level="normalized",
)
