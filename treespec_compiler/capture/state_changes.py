"""What a forward pass changes besides giving logits: buffers that may be K/V caches, and what is refused at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ..errors import Refusal, Unsupported
from .weight_ref import WeightRef


def put_logits_first(
    gm: fx.GraphModule, written: Sequence[str], weights: Mapping[str, WeightRef], tokens: fx.Node
) -> int:
    """Logits become output 0, the new contents of the `written` inputs outputs 1, 2, ... (they come first in `gm`).

    `strip native cache` proves that these buffers are K/V caches, or refuses. What is set as an attribute is dropped;
    returns how many of those values are computed from the tokens, which only a model that never reads them may keep.
    """
    foreign = [weights[n].name if n in weights else n for n in written if _nobodys(n, weights)]
    if foreign:
        raise Unsupported(
            Refusal.STATE,
            f"the forward pass changes state in place: {', '.join(foreign)}",
            way_out="call it without its own cache (use_cache=False), or move the update out of forward",
        )
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    values = list(output.args[0])
    updates, logits, attributes = values[: len(written)], values[len(written)], values[len(written) + 1 :]
    output.args = ((logits, *updates),)
    return sum(not (_is_table(value, weights, tokens) or _is_held(value, weights)) for value in attributes)


def _is_held(value: fx.Node, weights: Mapping[str, WeightRef]) -> bool:
    """Whether the value is a tensor that the model holds already, as `self.table = self.table.to(x.device)` gives.

    Setting it changes no later call, unless another one was there; a second call is compared here, too.
    """
    return value.op == "placeholder" and value.name in weights and not _nobodys(value.name, weights)


def kept_values() -> Unsupported:
    """The refusal of a model that keeps values of the tokens, and reads them or may do so."""
    return Unsupported(
        Refusal.STATE,
        "the forward pass keeps values besides the logits (it sets attributes), and reads what it keeps",
        way_out="move the assignment out of forward, or call it without its own cache (use_cache=False)",
    )


def _is_table(value: fx.Node, weights: Mapping[str, WeightRef], tokens: fx.Node) -> bool:
    """Whether the value is made of weights and of the number of tokens: a table computed when first needed.

    Setting it as an attribute then changes no later call, unless the model does something else once it is set; so a
    second call is compared (`semantics.lengths_check`).
    """
    stack, seen = [value], set()
    while stack:
        node = stack.pop()
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return False
        if node.op == "placeholder":
            counts = isinstance(node.meta.get("val"), (torch.SymInt, int))
            if not counts and (node is tokens or _nobodys(node.name, weights)):
                return False
        if node.target is torch.ops.aten.sym_size.int:
            continue
        stack.extend(n for n in node.all_input_nodes if n not in seen)
        seen.update(node.all_input_nodes)
    return True


def _nobodys(name: str, weights: Mapping[str, WeightRef]) -> bool:
    """Whether no module holds the tensor, so that nobody could keep the user's own copy from being written."""
    return name not in weights or (weights[name].owner is None and not weights[name].listed)
