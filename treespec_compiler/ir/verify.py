"""The executable spec of the levels: a short list of rules for each, run after every pass.

A rule gets the graph and returns a problem as text, or None. Levels are cumulative where that makes sense: from
"treeified" on, nothing may count the tokens of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from .arguments import is_filled
from .chosen_attention import is_tree_attention, tree_chosen_attention
from .inputs import ROWS, STREAM, is_pool, is_state, pool_names, state_names
from .library import definition
from .provenance import op_name
from .states import is_over_trees, kind_over_sequence
from .streaming import fetch, is_place, release

GraphRule = Callable[[fx.Graph], str | None]

LOGITS = "logits"
LEVELS = ("captured", "normalized", "recognized", "classified", "treeified", "stateful", "rows", "bound")


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function"]


def _without(names: set[str], what: str) -> GraphRule:
    def rule(graph: fx.Graph) -> str | None:
        found = (n for n in _calls(graph) if op_name(n) in names)
        bad = next((n for n in found if n.target is not torch.ops.aten.view.dtype), None)  # another value, no alias
        return f"{what}: {bad.format_node()}" if bad is not None else None

    return rule


def _tensor_inputs_only(graph: fx.Graph) -> str | None:
    bad = next(
        (n for n in graph.nodes if n.op == "placeholder" and not isinstance(n.meta.get("val"), torch.Tensor)), None
    )
    return f"an input that is not a tensor: {bad.name}" if bad is not None else None


def _named_outputs(names: Sequence[str]) -> GraphRule:
    """As many outputs as there are names: the logits [1, rows, V], and hidden states [1, T, D].

    A pipeline stage that is not the last one gives its stream instead of the logits.
    """

    def rule(graph: fx.Graph) -> str | None:
        outputs = [n for n in graph.nodes if n.op == "output"]
        values = outputs[-1].args[0] if outputs else ()
        if not isinstance(values, (tuple, list)) or len(values) != len(names) or names[0] not in (LOGITS, STREAM.name):
            return f"outputs {values}, expected {', '.join(names)}"
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, fx.Node) or (name != LOGITS and value.meta["val"].dim() != 3):
                return f"output {name} is {value}, expected a tensor [1, T, D]"
        return None

    return rule


def _logits_first(graph: fx.Graph) -> str | None:
    """The logits, and behind them what forward writes to buffers, until that is stripped."""
    outputs = [n for n in graph.nodes if n.op == "output"]
    values = outputs[-1].args[0] if outputs else ()
    return None if isinstance(values, (tuple, list)) and values else f"outputs {values}, expected the logits first"


def _every_value_known(graph: fx.Graph) -> str | None:
    bad = next((n for n in _calls(graph) if "val" not in n.meta), None)
    return f"a node without a fake value: {bad.format_node()}" if bad is not None else None


def _only_state_mutates(graph: fx.Graph) -> str | None:
    for node in _calls(graph):
        schema = getattr(node.target, "_schema", None)
        writes = schema is not None and schema.is_mutable and definition(node.target) not in (fetch, release)
        if writes and not is_tree_attention(node) and not is_over_trees(node):
            return f"something other than tree attention and states writes in place: {node.format_node()}"
    return None


def _streamed_in_order(graph: fx.Graph) -> str | None:
    """What lies in a slot is read between a fetch and the release of the same layer, each of which there is once."""
    held: dict[fx.Node, tuple[int, int]] = {}  # what is in a slot now: by input, the stream's handle and layer
    done: set[tuple[int, int]] = set()
    for node in _calls(graph):
        op = definition(node.target)
        if op is fetch:
            layer = (node.args[0], node.args[1])
            if layer in done or any(place in held for place in node.args[2]):
                return f"a layer is fetched twice, or into a slot that is taken: {node.format_node()}"
            done.add(layer)
            held |= dict.fromkeys(node.args[2], layer)
        elif op is release:
            layer = (node.args[0], node.args[1])
            if any(held.pop(place, None) != layer for place in node.args[2]):
                return f"a layer is released that is not there: {node.format_node()}"
        else:
            early = next((s for s in node.all_input_nodes if is_place(s.name) and s not in held), None)
            if early is not None:
                return f"{early.name} is read while no layer is there: {node.format_node()}"
    return f"layer {next(iter(held.values()))[1]} is never released" if held else None


def _pools_in_site_order(graph: fx.Graph) -> str | None:
    """Site i reads and writes pool_k_i and pool_v_i, and pool_index_i where an indexer chooses; nobody else does."""
    expected = 0
    wanted: list[str] = []
    for node in _calls(graph):
        if not is_tree_attention(node):
            continue
        indexed = definition(node.target) is tree_chosen_attention
        own = node.args[6:9] if indexed else node.args[3:5]
        pools = tuple(getattr(a, "name", a) for a in own)
        if pools != pool_names(expected, indexed):
            return f"attention {expected} has pools {pools}"
        if any(len(a.users) != 1 for a in own if isinstance(a, fx.Node)):
            return f"the pools of attention {expected} have other users"
        expected, wanted = expected + 1, [*wanted, *pools]
    found = [n.name for n in graph.nodes if n.op == "placeholder" and is_pool(n.name)]
    return None if found == wanted else f"pool inputs {found}, expected {wanted}"


def _states_in_site_order(graph: fx.Graph) -> str | None:
    """State site i has the inputs that `state_names(i)` says, and nobody else has; no op is over a whole sequence."""
    expected: list[str] = []
    for node in _calls(graph):
        if kind_over_sequence(node) is not None:
            return f"an op over one whole sequence: {node.format_node()}"
        if not is_over_trees(node):
            continue
        own = [a for a in node.all_input_nodes if is_state(a.name)]
        if any(len(a.users) != 1 for a in own):
            return f"the state of {node.format_node()} has other users"
        expected += [a.name for a in own]
    found = [n.name for n in graph.nodes if n.op == "placeholder" and is_state(n.name)]
    wanted = [name for i in range(len(found) // 2) for name in state_names(i)]
    return None if found == wanted == expected else f"state inputs {found}, read {expected}, expected {wanted}"


def _rows_selected(graph: fx.Graph) -> str | None:
    rows = next((n for n in graph.nodes if n.op == "placeholder" and n.name == ROWS), None)
    return None if rows is not None and rows.users else "logits are computed for every node"


def _all_arguments(graph: fx.Graph) -> str | None:
    bad = next((n for n in _calls(graph) if not is_filled(n)), None)
    return f"an aten call without all its arguments (`state.call` fills them): {bad.format_node()}" if bad else None


_NORMAL = {"aten.view", "aten._unsafe_view", "aten.detach", "aten.alias", "aten.lift_fresh_copy", "aten.dropout"}
_NORMAL_RULE = _without(_NORMAL | {"aten._assert_tensor_metadata"}, "an op that normalize removes")
_NO_SDPA = _without({"aten.scaled_dot_product_attention"}, "attention that is not recognized")
_NO_MASKED = _without({"treespec.attention"}, "attention with an unclassified mask")


def _no_counting(graph: fx.Graph) -> str | None:
    """No arange, and no running sum, along a dimension whose size is not fixed."""
    for node in _calls(graph):
        counts = op_name(node) == "aten.arange" and not isinstance(node.meta["val"].shape[0], int)
        if op_name(node) == "aten.cumsum":
            shape = node.args[0].meta["val"].shape
            counts = bool(shape) and not isinstance(shape[node.args[1]], int)
        if counts:
            return f"a value that counts the tokens of the sequence: {node.format_node()}"
    return None


_NO_SEQUENCE = _without({"treespec.causal_attention", "treespec.attention"}, "attention over one whole sequence")

_ADDED: dict[str, tuple[GraphRule, ...]] = {
    "captured": (_tensor_inputs_only, _logits_first, _every_value_known),
    "normalized": (_NORMAL_RULE, _all_arguments),
    "recognized": (_NO_SDPA,),
    "classified": (_NO_MASKED,),
    "treeified": (_no_counting,),
    "stateful": (_NO_SEQUENCE, _only_state_mutates, _pools_in_site_order, _states_in_site_order, _streamed_in_order),
    "rows": (_rows_selected,),
    "bound": (),
}


def problems(graph: fx.Graph, level: str, outputs: Sequence[str] = (LOGITS,)) -> list[str]:
    """What is wrong with a graph at this level, with outputs of these names; an empty list when nothing is."""
    rules = [rule for name in LEVELS[: LEVELS.index(level) + 1] for rule in _ADDED[name]]
    if STREAM.name in outputs:  # of a stage before the last one, which has every new node
        rules.remove(_rows_selected)
    if LEVELS.index(level) >= LEVELS.index("recognized"):  # until then forward's writes are outputs too
        rules.append(_named_outputs(outputs))
    found = [text for rule in rules if (text := rule(graph)) is not None]
    try:
        graph.lint()
    except RuntimeError as error:
        found.append(str(error))
    return found
